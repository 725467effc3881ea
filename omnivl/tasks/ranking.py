"""Scores of retrieval: recalls with chance and baseline, and the median rank.

Shapes: Q queries, C candidates.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from omnivl.tasks.results import Score, mean_score
from omnivl.tasks.scorers.recall import PLACES, Ranked, chance_of, median_rank, recall_at, values_of_folds


def metrics_of(direction: str) -> tuple[str, ...]:
    """Metrics of ``scores_of_ranks`` of a direction such as ``image->text``."""
    return (*(f"{direction} R@{k}" for k in PLACES), f"{direction} median rank")


def scores_of_ranks(
    name: str,
    direction: str,
    found: Sequence[Ranked],
    baseline: NDArray[np.int64] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> list[Score]:
    """Recalls with chance and, if there is a baseline, its recalls; the median rank. Means over folds.

    Args:
        name: Name of the task.
        direction: Query and candidates, e.g. ``image->text``.
        found: The queries of each fold; of one, if the whole is ranked.
        baseline: The baseline's ranks of all queries, int64 ``[Q]``, from 1.
        clusters: Of all queries, what those share that are no independent draws.
    """
    *of_recalls, of_median = metrics_of(direction)
    scores = [
        mean_score(
            name,
            metric,
            values_of_folds([fold.ranks <= k for fold in found]),
            chance=_mean([chance_of(fold.relevance.counts(), fold.relevance.columns, k) for fold in found]),
            baseline=None if baseline is None else recall_at(baseline, k),
            clusters=clusters,
        )
        for k, metric in zip(PLACES, of_recalls, strict=True)
    ]
    median, count = _mean([median_rank(fold.ranks) for fold in found]), sum(len(fold.ranks) for fold in found)
    beside = None if baseline is None else median_rank(baseline)
    return [*scores, Score(name, of_median, median, None, beside, count, graded=False)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
