"""Ranks and recalls from a similarity matrix, which need not be held whole.

Shapes: Q queries, C candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnivl.tasks.results import Score, mean_score

PLACES = (1, 5, 10)
"""Numbers of places at which recall is reported."""

LARGEST_BLOCK = 1 << 24
"""Values of a block of a similarity matrix, 64 MiB in fp32."""

Rows = Callable[[slice], Tensor]
"""Some rows of a similarity matrix, float ``[rows, C]``; the same each time that they are asked for."""


@dataclass(frozen=True)
class Relevance:
    """Which candidates are relevant to which queries.

    Attributes:
        candidates: Of each query, the columns of those that are relevant to it; at least one.
        columns: C.
        per_value: Values that have to be held for each value of the similarity matrix, such as the embeddings of a
            query.
    """

    candidates: tuple[tuple[int, ...], ...]
    columns: int
    per_value: int = 1

    def rows(self, part: slice) -> Tensor:
        """Some rows as bool ``[rows, C]``."""
        own = self.candidates[part]
        relevant = torch.zeros(len(own), self.columns, dtype=torch.bool)
        for row, columns in enumerate(own):
            relevant[row, list(columns)] = True
        return relevant

    def counts(self) -> tuple[Tensor, Tensor]:
        """Relevant candidates of each query, int64 ``[Q]``, and queries of each candidate, int64 ``[C]``."""
        all_columns = torch.tensor([column for columns in self.candidates for column in columns], dtype=torch.long)
        of_queries = torch.tensor([len(columns) for columns in self.candidates])
        return of_queries, torch.bincount(all_columns, minlength=self.columns)

    def blocks(self) -> Iterator[slice]:
        """Parts of the rows, in order, of at most ``LARGEST_BLOCK`` values."""
        size = max(1, LARGEST_BLOCK // max(1, self.columns * self.per_value))
        for start in range(0, len(self.candidates), size):
            yield slice(start, min(len(self.candidates), start + size))


def ranks_both_ways(rows: Rows, relevance: Relevance) -> tuple[Tensor, Tensor]:
    """``best_rank`` of each query, int64 ``[Q]``, and of each candidate among the queries, int64 ``[C]``.

    Memory grows with Q and with C, not with their product.

    Args:
        rows: The similarity matrix by its rows; each is asked for twice.
        relevance: What is relevant; each candidate is so to a query.
    """
    of_queries: list[Tensor] = []
    best = torch.full((relevance.columns,), -torch.inf)
    for part in relevance.blocks():
        block, relevant = rows(part), relevance.rows(part)
        of_queries.append(best_rank(block, relevant))
        best = torch.maximum(best, block.masked_fill(~relevant, -torch.inf).amax(dim=0))
    of_candidates = torch.zeros(relevance.columns, dtype=torch.long)
    for part in relevance.blocks():
        of_candidates += _before(rows(part), best, relevance.rows(part)).sum(dim=0)
    return torch.cat(of_queries), of_candidates


def _before(similarity: Tensor, best: Tensor, relevant: Tensor) -> Tensor:
    """Which candidates that are not relevant rank before the best relevant one; those that are no number do."""
    return ~(similarity < best) & ~relevant


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
    return _before(similarity, best, relevant).sum(dim=1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries with a relevant candidate among the first k."""
    return float((ranks < k).double().mean())


def chance_recall_at(relevant: Tensor, k: int) -> float:
    """``chance_of`` a matrix, bool ``[Q, C]``."""
    return chance_of(relevant.sum(dim=1), relevant.shape[1], k)


def chance_of(counts: Tensor, candidates: int, k: int) -> float:
    """Expected recall at k of a random order: ``1 - prod_{i<k} (C - r - i) / (C - i)``, averaged over queries.

    Args:
        counts: ``[Q]``, relevant candidates of each query.
        candidates: C.
        k: Number of places.
    """
    misses = candidates - counts.double()
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
    ranks = best_rank(similarity, relevant)
    beside = None if baseline is None else best_rank(baseline, relevant)
    return scores_of_ranks(name, direction, ranks, relevant.sum(dim=1), relevant.shape[1], beside)


def recalls_of(direction: str) -> tuple[str, ...]:
    """Metrics of the recalls of a direction such as ``image->text``."""
    return tuple(f"{direction} R@{k}" for k in PLACES)


def recalls_both_ways(media: str) -> tuple[str, ...]:
    """Metrics of the recalls of a medium's texts and of the texts' media."""
    return (*recalls_of(f"{media}->text"), *recalls_of(f"text->{media}"))


def scores_of_ranks(
    name: str, direction: str, ranks: Tensor, counts: Tensor, candidates: int, baseline: Tensor | None = None
) -> list[Score]:
    """Recalls of ranks with chance and, if there is a baseline, its recalls.

    Args:
        name: Name of the task.
        direction: Query and candidates, e.g. ``image->text``.
        ranks: int64 ``[Q]``, of the best relevant candidates.
        counts: ``[Q]``, relevant candidates of each query.
        candidates: C.
        baseline: The baseline's ranks, int64 ``[Q]``.
    """
    return [
        mean_score(
            name,
            metric,
            (ranks < k).numpy(),
            chance=chance_of(counts, candidates, k),
            baseline=None if baseline is None else recall_at(baseline, k),
        )
        for k, metric in zip(PLACES, recalls_of(direction), strict=True)
    ]
