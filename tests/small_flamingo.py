"""A small Flamingo and a small Frozen, and what tests of them share."""

from dataclasses import replace

import torch
from small_language import TOKENS, LetterTokenizer

from omnivl.architectures import Flamingo, Frozen
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import PrepareContext
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.tokenizer import load_readers
from omnivl.objectives import InterleavedLM, PrefixLM
from omnivl.parts.language import LanguageModel
from omnivl.parts.resampler import AttentionHeads, Resampler
from omnivl.parts.sizes import Transformer

BLOCKS = Transformer(hidden_size=24, num_heads=2, layers=4, activation="relu", norm_eps=1e-5)
LANGUAGE = LanguageModel(BLOCKS, vocab_size=40, positions=24, length=20)
VISION = Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5)
FLAMINGO = Flamingo(
    vision=VISION,
    resampler=Resampler(num_heads=2, head_size=4, latents=3, layers=2),
    cross_attention=AttentionHeads(num_heads=2, head_size=6),
    gated_every=2,
    language=LANGUAGE,
    image_size=8,
    patch_size=4,
)
FROZEN = Frozen(
    vision=VISION, language=replace(LANGUAGE, blocks=replace(BLOCKS, layers=2), length=8), image_size=8, patch_size=4
)
INTERLEAVED, PREFIX = InterleavedLM(), PrefixLM()
KEPT = ["embed.*", "visual_*", "language_embed.block.words", "language_embed.block.positions", "language_[0-9]*"]
"""What Flamingo does not train."""
READERS = load_readers(FLAMINGO.text_inputs, LetterTokenizer())
TEXTS = ("<image>ab<EOC>xy<image>cd<EOC>", "k<image>e<image>fgh<EOC>")


def document_batch(texts=TEXTS, pictures=2, seed=0, objective=INTERLEAVED, kind="images_text"):
    """Documents with so many random pictures each."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (len(texts), pictures, 3, 8, 8)
    frames, own = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn), torch.arange(len(texts))
    batch = Batch(
        kind, None if kind == "text" else frames, own[:, None], own, own, own, captions=tuple(texts), entry="pages"
    )
    prepared = objective.prepare(batch, PrepareContext(0, "pages", TOKENS, (2, 2), 0, readers=READERS))
    return replace(batch, prepared=prepared)


def documents(texts=TEXTS, pictures=2, seed=0, objective=INTERLEAVED, kind="images_text"):
    """The state of ``document_batch``."""
    layout = plan_layout((objective,), kind, len(texts), pictures)
    return State.from_batch(document_batch(texts, pictures, seed, objective, kind), layout)


def caption_batch(captions=("abc", "z")):
    """Random images with captions, for Frozen."""
    drawn = torch.Generator().manual_seed(1)
    shape, own = (len(captions), 1, 3, 8, 8), torch.arange(len(captions))
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn)
    batch = Batch("image_text", frames, own[:, None], own, own, own, captions=tuple(captions))
    readers = load_readers(FROZEN.text_inputs, LetterTokenizer())
    prepared = PREFIX.prepare(batch, PrepareContext(0, "test", TOKENS, (2, 2), 0, readers=readers))
    return replace(batch, prepared=prepared)
