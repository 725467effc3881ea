"""Recall at 1 within a batch, a metric of contrastive objectives."""

import torch
from torch import Tensor

from omnivl.objectives.key_queue import Pairs
from omnivl.parts.similarity import similarity


@torch.no_grad()
def recalls_at_1(queries: Pairs, keys: Pairs) -> dict[str, Tensor]:
    """``visual_to_text_r1`` and ``text_to_visual_r1``: share of queries whose nearest key has their identity."""
    nearest_text = similarity(queries.visual, keys.text).argmax(-1)
    nearest_visual = similarity(queries.text, keys.visual).argmax(-1)
    return {
        "visual_to_text_r1": (keys.identity[nearest_text] == queries.identity).float().mean(),
        "text_to_visual_r1": (keys.identity[nearest_visual] == queries.identity).float().mean(),
    }
