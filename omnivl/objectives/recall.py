"""Recall at 1 within a batch, a metric of contrastive objectives."""

import torch
from torch import Tensor


def recalls(visual_is_right: Tensor, text_is_right: Tensor) -> dict[str, Tensor]:
    """``visual_to_text_r1`` and ``text_to_visual_r1``: the share of queries whose nearest key has their identity.

    Args:
        visual_is_right: Whether this is so for each picture or clip, bool ``[B]``.
        text_is_right: Likewise for each text.
    """
    of_visual, of_text = torch.stack([visual_is_right, text_is_right]).float().mean(1).unbind()
    return {"visual_to_text_r1": of_visual, "text_to_visual_r1": of_text}
