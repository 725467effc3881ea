"""CMU-MOSI and MOSEI: errors of a sentiment from -3 to 3, and accuracies of it as classes.

Source: src/MMSA/utils/metricsTop.py of github.com/thuiar/MMSA; src/eval_metrics.py of MulT,
    github.com/yaohungt/Multimodal-Transformer (arXiv 1906.00295); MISA, arXiv 2005.03545.
Differs: everything is computed in float64 and nothing is rounded, where MMSA rounds to four places.

Two classes come in two versions. ``has0`` takes all utterances and cuts at >= 0; ``non0`` leaves out those with the
label 0 and cuts at > 0. MulT reports ``non0``; without its ``exclude_zero`` it takes all and cuts at > 0, a third
version that papers do not report.

Shapes: N utterances.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[Any]
Zeros = Literal["has0", "non0"]


def sentiment_scores(predicted: Values, truth: Values, swapped: bool = False) -> dict[str, float]:
    """``MAE`` (lower is better), ``correlation``, ``Acc-7``, and ``Acc-2`` and ``F1`` by ``has0`` and ``non0``.

    Args:
        predicted: ``[N]``.
        truth: ``[N]``.
        swapped: See ``f1_2``.
    """
    found = {
        "MAE": float(np.abs(_array(predicted) - _array(truth)).mean()),
        "correlation": correlation(predicted, truth),
        "Acc-7": float(is_right_7(predicted, truth).mean()),
    }
    versions: tuple[Zeros, ...] = ("has0", "non0")
    for zeros in versions:
        ours, theirs = positive(predicted, truth, zeros)
        found[f"Acc-2 {zeros}"] = float((ours == theirs).mean()) if ours.size else float("nan")
        found[f"F1 {zeros}"] = f1_2(predicted, truth, zeros, swapped)
    return found


def correlation(predicted: Values, truth: Values) -> float:
    """Pearson's correlation; NaN where either side is constant."""
    ours, theirs = _array(predicted), _array(truth)
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    scale = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    return float((ours * theirs).sum()) / scale if scale else float("nan")


def is_right_7(predicted: Values, truth: Values) -> NDArray[np.bool_]:
    """Whether both round to one of the seven classes -3 to 3, bool ``[N]``; Acc-7 is the mean.

    Both are cut off at -3 and 3 and rounded as numpy rounds, halves to the even number: 0.5 to 0, 1.5 to 2.
    """
    return np.asarray(_class_of(predicted) == _class_of(truth))


def positive(predicted: Values, truth: Values, zeros: Zeros) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two classes of prediction and label, bool ``[M]``, M at most N; Acc-2 is the share that agrees."""
    ours, theirs = _array(predicted), _array(truth)
    if zeros == "has0":
        return ours >= 0, theirs >= 0
    kept = theirs != 0
    return ours[kept] > 0, theirs[kept] > 0


def f1_2(predicted: Values, truth: Values, zeros: Zeros, swapped: bool = False) -> float:
    """The weighted F1 of the two classes: the mean of the F1 of each, weighted by its share.

    Args:
        predicted: ``[N]``.
        truth: ``[N]``.
        zeros: See the top of this file.
        swapped: Whether prediction and label change places, as in the code of MulT and MISA, ``f1_score(prediction,
            label)``. The F1 of a class is the same; its weight is its share of the predictions instead of the labels.

    Returns:
        The F1; a class that neither side has does not count. NaN if no utterance is left.
    """
    ours, theirs = positive(predicted, truth, zeros)
    total = 0.0
    for label in (False, True):
        mine, right = ours == label, theirs == label
        size = int(mine.sum() + right.sum())
        weight = float((mine if swapped else right).sum())
        total += weight * 2 * float((mine & right).sum()) / size if size else 0.0
    return total / len(theirs) if len(theirs) else float("nan")


def _array(values: Values) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _class_of(values: Values) -> NDArray[np.float64]:
    return np.clip(_array(values), -3.0, 3.0).round()
