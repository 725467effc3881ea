"""Ranks and recalls from a similarity matrix.

Shapes: Q queries, C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omnivl.tasks.results import Score

PLACES = (1, 5, 10)
"""Numbers of places at which recall is reported."""


def best_rank(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Rank of the best relevant candidate of each query, 0 for the first place.

    Ties count against the query: an equally similar candidate ranks before the relevant one, so that a model that maps
    everything to one point scores zero, not one.

    Args:
        similarity: float ``[Q, C]``.
        relevant: bool ``[Q, C]``, at least one true per row.

    Returns:
        int64 ``[Q]``.
    """
    assert bool(relevant.any(dim=1).all()), "every query needs a relevant candidate"
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~relevant).sum(dim=1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries with a relevant candidate among the first k."""
    return float((ranks < k).double().mean())


def chance_recall_at(relevant: Tensor, k: int) -> float:
    """Expected recall at k of a random order: ``1 - prod_{i<k} (C - r - i) / (C - i)``, averaged over queries.

    Args:
        relevant: bool ``[Q, C]``.
        k: Number of places.
    """
    candidates = relevant.shape[1]
    misses = candidates - relevant.sum(dim=1).double()
    probability = torch.ones_like(misses)
    for place in range(min(k, candidates)):
        probability = probability * ((misses - place).clamp(min=0) / (candidates - place))
    return float((1 - probability).mean())


def recalls(similarity: Tensor, relevant: Tensor, places: Sequence[int] = PLACES) -> dict[int, float]:
    """Recall at each of ``places``."""
    ranks = best_rank(similarity, relevant)
    return {k: recall_at(ranks, k) for k in places}


def recall_scores(
    name: str, direction: str, similarity: Tensor, relevant: Tensor, baseline: Tensor | None = None
) -> list[Score]:
    """Recalls with chance and, if there is a baseline, its recalls.

    Args:
        name: Name of the task.
        direction: Query and candidates, e.g. ``image->text``.
        similarity: float ``[Q, C]``.
        relevant: bool ``[Q, C]``.
        baseline: The baseline's similarity, ``[Q, C]``.
    """
    found = recalls(similarity, relevant)
    beside = {} if baseline is None else recalls(baseline, relevant)
    return [
        Score(name, f"{direction} R@{k}", found[k], chance_recall_at(relevant, k), beside.get(k), len(relevant))
        for k in PLACES
    ]
