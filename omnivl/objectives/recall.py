"""Recall at 1 within a batch, a metric of contrastive objectives."""

from torch import Tensor

from omnivl.objectives.key_queue import Pairs
from omnivl.objectives.tiles import SpreadKeys, nearest_is_positive


def recalls(visual_is_right: Tensor, text_is_right: Tensor) -> dict[str, Tensor]:
    """``visual_to_text_r1`` and ``text_to_visual_r1``: the share of queries whose nearest key has their identity.

    Args:
        visual_is_right: Whether this is so for each picture or clip, bool ``[B]``.
        text_is_right: Likewise for each text.
    """
    return {"visual_to_text_r1": visual_is_right.float().mean(), "text_to_visual_r1": text_is_right.float().mean()}


def recalls_at_1(queries: Pairs, visual: SpreadKeys, text: SpreadKeys) -> dict[str, Tensor]:
    """``recalls`` of queries among the keys of a batch. Called by every replica."""
    return recalls(
        nearest_is_positive(queries.visual.detach(), queries.identity, text),
        nearest_is_positive(queries.text.detach(), queries.identity, visual),
    )
