"""Boxes: IoU, accuracy of referring expressions, recall of phrases.

A box is [left, top, right, bottom].

Source: Yu et al., arXiv 1608.00272, and ``computeIoU`` of github.com/lichengunc/refer (expressions); Plummer et al.,
    arXiv 1505.04870, and MDETR, arXiv 2104.12763, with the evaluation of github.com/ashkamath/mdetr (phrases).
Differs: a phrase for which nothing was predicted is missed, where MDETR's evaluation fails.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def iou(boxes: ArrayLike, others: ArrayLike, inclusive: bool = False) -> NDArray[np.float64]:
    """Intersection over union of boxes, broadcast: ``[N, 4]`` with ``[N, 4]``, or ``[N, 1, 4]`` with ``[M, 4]``.

    Boxes with a right side left of their left one have no area; an empty union gives 0.

    Plain IoU is that of OFA and MDETR, and does not change with the unit. ``computeIoU`` of refer has boxes
    [left, top, width, height] in pixels, takes ``left + width - 1`` as the last pixel and adds 1 to the size of the
    intersection. The two cancel: it is the plain IoU of [left, top, left + width, top + height], but for overlaps of
    at most one pixel in width or height, which it counts as none.

    Args:
        boxes: ``[..., 4]``.
        others: ``[..., 4]``.
        inclusive: Whether right and bottom are the last pixels inside, as in Faster R-CNN's code and grounded
            captioning: a width is then right - left + 1. Boxes have to be in pixels.

    Returns:
        float64, the broadcast shape without the last axis.
    """
    first, second = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)
    more = float(inclusive)
    starts, ends = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    inside = np.prod((ends - starts + more).clip(min=0), axis=-1)
    union = _areas(first, more) + _areas(second, more) - inside
    return np.asarray(inside / np.where(union > 0, union, 1.0))


def _areas(boxes: NDArray[np.float64], more: float) -> NDArray[Any]:
    sides: NDArray[np.float64] = (boxes[..., 2:] - boxes[..., :2] + more).clip(min=0)
    return np.asarray(np.prod(sides, axis=-1))


def is_right(
    predicted: ArrayLike, truth: ArrayLike, threshold: float = 0.5, inclusive: bool = False
) -> NDArray[np.bool_]:
    """Whether the box of each expression has an IoU of at least ``threshold``; accuracy is the mean.

    Args:
        predicted: ``[N, 4]``.
        truth: ``[N, 4]``, or ``[4]``.
        threshold: See above.
        inclusive: See ``iou``.

    Returns:
        bool ``[N]``.
    """
    return iou(predicted, truth, inclusive) >= threshold


def merged(boxes: ArrayLike) -> NDArray[np.float64]:
    """The smallest box ``[1, 4]`` around boxes ``[M, 4]``, M at least 1."""
    given = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([given[:, :2].min(axis=0), given[:, 2:].max(axis=0)])[None]


def phrase_ranks(
    ranked: Sequence[ArrayLike],
    truth: Sequence[ArrayLike],
    merge: bool = False,
    threshold: float = 0.5,
    inclusive: bool = False,
) -> NDArray[np.float64]:
    """The place of the first box of each phrase that hits, from 1; ``recall.recall_at`` of them is R@k.

    A phrase may have several boxes. By the any-box protocol a box hits if its IoU with any of them is at least
    ``threshold``; by the merged-box protocol, with the smallest box around them. Figures of the two do not compare.

    Args:
        ranked: Predicted boxes of each phrase ``[K, 4]``, best first; K may differ, and be 0.
        truth: Boxes of each phrase, ``[M, 4]``. Phrases without one (M 0) are not scored.
        merge: Whether by the merged-box protocol.
        threshold: See above.
        inclusive: See ``iou``.

    Returns:
        float64, one for each phrase with boxes, in order; infinite where none hits.
    """
    found: list[float] = []
    for boxes, own in zip(ranked, truth, strict=True):
        right = np.asarray(own, dtype=np.float64).reshape(-1, 4)
        if not len(right):
            continue
        given = np.asarray(boxes, dtype=np.float64).reshape(-1, 1, 4)
        best = iou(given, merged(right) if merge else right, inclusive)
        hits = np.flatnonzero((best >= threshold).any(axis=1))
        found.append(float(hits[0] + 1) if hits.size else math.inf)
    return np.array(found)
