"""A tiny configuration with every objective, and batches of noise for it."""

from dataclasses import replace

import torch

from omnivl.architectures import OmniVL
from omnivl.data.batch import Batch, is_video
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MCM, MFM, MLM, MRM, VLM, PrepareContext, UniVLC

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=50, num_reserved=5)
CONFIG = replace(
    OmniVL.presets["tiny"],
    hidden_size=16,
    num_heads=2,
    vision_layers=2,
    text_layers=2,
    alignment_layers=2,
    generation_layers=2,
    image_size=16,
    video_size=16,
    num_frames=4,
    text_length=8,
    vocab_size=50,
    projection_size=8,
)
EVERYTHING = (MLM(), MRM(), MFM(targets="momentum"), MCM(), UniVLC(queue_size=16), VLM(), LM())


def make_batch(kind, objectives=EVERYTHING, size=4):
    times = CONFIG.num_frames if is_video(kind) else 1
    draw = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (size, times, 3, 16, 16), generator=draw, dtype=torch.uint8)
    token_ids = torch.randint(5, 50, (size, 8), generator=draw)
    token_ids[:, 0], token_ids[:, 5], token_ids[:, 6:] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    own = torch.arange(size)
    batch = Batch(kind, frames, token_ids, own, own, own)
    context = PrepareContext(0, "test", TOKENS, CONFIG.inputs.grid(is_video(kind)), 0)
    prepared = {}
    for objective in objectives:
        if objective.demands(kind, size) is not None:
            prepared |= objective.prepare(batch, context)
    return replace(batch, prepared=prepared)
