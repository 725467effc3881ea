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
from omnivl.objectives import InterleavedLM
from omnivl.parts.language import LanguageModel
from omnivl.parts.resampler import Heads, Resampler
from omnivl.parts.sizes import Transformer

BLOCKS = Transformer(hidden_size=24, num_heads=2, layers=4, activation="relu", norm_eps=1e-5)
LANGUAGE = LanguageModel(BLOCKS, vocab_size=40, positions=24, length=20)
VISION = Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5)
FLAMINGO = Flamingo(
    vision=VISION,
    resampler=Resampler(num_heads=2, head_size=4, latents=3, layers=2),
    gates=Heads(num_heads=2, head_size=6),
    gated_every=2,
    language=LANGUAGE,
    image_size=8,
    patch_size=4,
)
FROZEN = Frozen(
    vision=VISION, language=replace(LANGUAGE, blocks=replace(BLOCKS, layers=2), length=8), image_size=8, patch_size=4
)
INTERLEAVED = InterleavedLM()
KEPT = ["embed.*", "visual_*", "language_embed.block.words", "language_embed.block.positions", "language_[0-9]*"]
"""What Flamingo does not train."""
READERS = load_readers(FLAMINGO.text_inputs, LetterTokenizer())
TEXTS = ("<image>ab<EOC>xy<image>cd<EOC>", "k<image>e<image>fgh<EOC>")


def documents(texts=TEXTS, pictures=2, seed=0, objective=INTERLEAVED, kind="images_text"):
    """The state of a batch of documents, with so many random pictures each."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (len(texts), pictures, 3, 8, 8)
    frames, own = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn), torch.arange(len(texts))
    batch = Batch(
        kind, None if kind == "text" else frames, own[:, None], own, own, own, captions=tuple(texts), entry="pages"
    )
    prepared = objective.prepare(batch, PrepareContext(0, "pages", TOKENS, (2, 2), 0, readers=READERS))
    layout = plan_layout((objective,), kind, len(texts), pictures)
    return State.from_batch(replace(batch, prepared=prepared), layout)
