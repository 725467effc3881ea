"""Referring segmentation: mean IoU, overall IoU and precision at thresholds.

Source: LAVT, arXiv 2112.02244, section 4; test.py of github.com/yz93/LAVT-RIS.
Differs: the overall IoU of masks that are all empty is 0, where the official one is NaN.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoUs at which precision is reported."""


def overlap(predicted: NDArray[Any], truth: NDArray[Any]) -> tuple[int, int]:
    """The pixels of the intersection and of the union of two masks ``[H, W]``; what is not 0 is inside."""
    assert predicted.shape == truth.shape, "masks of one size"
    return int(np.logical_and(predicted, truth).sum()), int(np.logical_or(predicted, truth).sum())


def ious(intersections: NDArray[Any], unions: NDArray[Any]) -> NDArray[np.float64]:
    """The IoU of each expression, ``[N]``: intersection over union, and 0 where the union is empty."""
    union = np.asarray(unions, dtype=np.float64)
    return np.asarray(intersections, dtype=np.float64) / np.where(union > 0, union, 1.0)


def mask_scores(intersections: NDArray[Any], unions: NDArray[Any]) -> dict[str, float]:
    """``mIoU``, ``oIoU`` and ``P@0.5`` to ``P@0.9``.

    mIoU is the mean of ``ious``. oIoU is the sum of the intersections over the sum of the unions, so that large objects
    count more. P@t is the share of expressions with an IoU of at least t.

    Args:
        intersections: Pixels of each expression's ``overlap``, ``[N]``; pictures with several expressions have one
            entry for each.
        unions: Likewise.
    """
    each = ious(intersections, unions)
    total = float(np.sum(unions))
    precisions = {f"P@{threshold}": float(np.mean(each >= threshold)) for threshold in THRESHOLDS}
    overall = float(np.sum(intersections)) / total if total else 0.0
    return {"mIoU": float(each.mean()), "oIoU": overall, **precisions}


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """A mask as COCO's files have it where it is not compressed.

    Args:
        mask: ``[H, W]``.

    Returns:
        ``size``: H and W; ``counts``: column by column the lengths of runs, the first of what is outside (maybe 0),
        the next of what is inside, and so on.
    """
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}
