"""Recall at 1 within a batch, a metric of contrastive objectives."""

from torch import Tensor


def recalls(visual_is_right: Tensor, text_is_right: Tensor) -> dict[str, Tensor]:
    """``visual_to_text_r1`` and ``text_to_visual_r1``: the share of queries whose nearest key has their identity.

    Args:
        visual_is_right: Whether this is so for each picture or clip, bool ``[B]``.
        text_is_right: Likewise for each text.
    """
    return {"visual_to_text_r1": visual_is_right.float().mean(), "text_to_visual_r1": text_is_right.float().mean()}
