"""A small BLIP-2 with transformers' class of its sizes, and batches for it."""

from dataclasses import replace

import torch
from small_towers import SIZES, TOKENS
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from omnivl.architectures import BLIP2
from omnivl.data.batch import Batch
from omnivl.objectives import ITC, LM, VLM, Objective, PrepareContext
from omnivl.parts.sizes import Transformer, Words

SMALL = BLIP2(
    vision=Transformer(hidden_size=24, num_heads=2, layers=2),
    qformer=Transformer(hidden_size=16, num_heads=2, layers=3, norm="post", norm_eps=1e-12),
    num_queries=4,
    words=Words(length=7, vocab_size=50),
    image_size=16,
    patch_size=8,
    projection_size=8,
)
STAGE_1: tuple[Objective, ...] = (
    ITC(temperature_bounds=(1e-4, 1e4), label_smoothing=0.1),
    VLM(negatives="global"),
    LM(label_smoothing=0.1),
)


def peer() -> Blip2ForImageTextRetrieval:
    """Transformers' class, which keeps its dropout out."""
    words = {"vocab_size": 50, "max_position_embeddings": 7, "encoder_hidden_size": 24, "use_qformer_text_input": True}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = {**SIZES, "hidden_size": 24, "intermediate_size": 96, "image_size": 16, "patch_size": 8}
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**SIZES, "num_hidden_layers": 3, **words, **still},
        num_query_tokens=4,
        image_text_hidden_size=8,
        image_token_index=None,
    )
    return Blip2ForImageTextRetrieval(config)


def make_batch(objectives=STAGE_1, size=4, frames=1):
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (size, frames, 3, 16, 16), generator=draw, dtype=torch.uint8)
    token_ids = torch.randint(5, 50, (size, 7), generator=draw)
    token_ids[:, 0], token_ids[:, 4], token_ids[:, 5:] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    own = torch.arange(size)
    batch = Batch("image_text" if frames == 1 else "video_text", pixels, token_ids, own, own, own)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)
