"""Ranks and recalls of retrieval by the protocols of COCO, Flickr30K and MSR-VTT.

The similarity matrix need not be held whole.

Ranks count from 1. Where nothing ties, a rank is the number of candidates that are strictly more similar, plus 1.
Among ties the rule is ``ties``:

- ``against`` the query: an equally similar wrong candidate ranks before the right one, so that a model that maps
  everything to one point scores zero;
- ``for`` the query: strictly greater + 1, as many published programs count; the same model then scores one.

A similarity that is no number ranks before everything, and a right candidate without one behind everything.

Source: Karpathy and Fei-Fei, arXiv 1412.2306 (splits, five captions a picture); VSE++, arXiv 1707.05612, whose
    evaluation defines the folds; CLIP4Clip, arXiv 2104.08860.
Differs: those programs sort, and look up where the right candidate lies; among ties that depends on the sort.
    CLIP4Clip's looks up equal values instead, so that ties give it more ranks than queries. VSE++ takes the floor of
    the median rank.

Shapes: Q queries, C candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError

PLACES = (1, 5, 10)
"""Numbers of places at which recall is reported."""

LARGEST_BLOCK = 1 << 24
"""Values of a block of a similarity matrix, 64 MiB in fp32."""

Ties = Literal["against", "for"]
Floats = NDArray[np.floating[Any]]

Rows = Callable[[slice], Floats]
"""Some rows of a similarity matrix, float ``[rows, C]``, larger is better; the same each time they are asked for."""


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

    def rows(self, part: slice) -> NDArray[np.bool_]:
        """Some rows as bool ``[rows, C]``."""
        own = self.candidates[part]
        relevant = np.zeros((len(own), self.columns), dtype=np.bool_)
        for row, columns in enumerate(own):
            relevant[row, list(columns)] = True
        return relevant

    def counts(self) -> NDArray[np.int64]:
        """Relevant candidates of each query, int64 ``[Q]``."""
        return np.array([len(columns) for columns in self.candidates], dtype=np.int64)

    def blocks(self) -> Iterator[slice]:
        """Parts of the rows, in order, of at most ``LARGEST_BLOCK`` values."""
        size = max(1, LARGEST_BLOCK // max(1, self.columns * self.per_value))
        for start in range(0, len(self.candidates), size):
            yield slice(start, min(len(self.candidates), start + size))

    def transposed(self) -> "Relevance":
        """Candidates as queries; every candidate has to be relevant to one."""
        own: list[list[int]] = [[] for _ in range(self.columns)]
        for row, columns in enumerate(self.candidates):
            for column in columns:
                own[column].append(row)
        return Relevance(tuple(map(tuple, own)), len(self.candidates), self.per_value)

    def within(self, part: slice) -> tuple["Relevance", list[int]]:
        """Some queries with their candidates alone.

        Returns:
            Their relevance, and the columns that its columns are, ascending.
        """
        own = self.candidates[part]
        kept = sorted({column for columns in own for column in columns})
        places = {column: place for place, column in enumerate(kept)}
        candidates = tuple(tuple(places[column] for column in columns) for columns in own)
        return Relevance(candidates, len(kept), self.per_value), kept


@dataclass(frozen=True)
class Ranked:
    """What a figure reads of some queries that were ranked among the same candidates.

    Attributes:
        ranks: int64 ``[Q]``, from 1, of the best relevant candidates.
        relevance: What is relevant.
    """

    ranks: NDArray[np.int64]
    relevance: Relevance


def ranks_of(rows: Rows, relevance: Relevance, ties: Ties = "against") -> NDArray[np.int64]:
    """The rank of the best relevant candidate of each query among those that are not relevant.

    Args:
        rows: The similarity matrix by its rows.
        relevance: What is relevant.
        ties: See the top of this file.

    Returns:
        int64 ``[Q]``, from 1.
    """
    return np.concatenate([best_ranks(rows(part), relevance.rows(part), ties) for part in relevance.blocks()])


def ranks_both_ways(
    rows: Rows, relevance: Relevance, ties: Ties = "against"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``ranks_of`` the queries, and of the candidates among the queries, of one matrix.

    A picture with several captions finds its texts at the best rank of any of them; each caption is a query.
    Memory grows with Q and with C, not with their product.

    Args:
        rows: The similarity matrix by its rows; each is asked for twice.
        relevance: What is relevant; each candidate is so to a query.
        ties: See the top of this file.

    Returns:
        int64 ``[Q]`` and int64 ``[C]``, from 1.
    """
    of_queries: list[NDArray[np.int64]] = []
    best: NDArray[Any] = np.full(relevance.columns, -np.inf)
    for part in relevance.blocks():
        block, relevant = rows(part), relevance.rows(part)
        of_queries.append(best_ranks(block, relevant, ties))
        best = np.maximum(best.astype(block.dtype), _relevant_alone(block, relevant).max(axis=0))
    of_candidates = np.ones(relevance.columns, dtype=np.int64)
    for part in relevance.blocks():
        of_candidates += _before(rows(part), best, relevance.rows(part), ties).sum(axis=0)
    return np.concatenate(of_queries), of_candidates


def best_ranks(similarity: Floats, relevant: NDArray[np.bool_], ties: Ties = "against") -> NDArray[np.int64]:
    """``ranks_of`` a matrix that is held.

    Args:
        similarity: float ``[Q, C]``.
        relevant: bool ``[Q, C]``, at least one true per row.
        ties: See the top of this file.
    """
    assert relevant.any(axis=1).all(), "every query needs a relevant candidate"
    best = _relevant_alone(similarity, relevant).max(axis=1, keepdims=True)
    return np.asarray(_before(similarity, best, relevant, ties).sum(axis=1) + 1)


def _relevant_alone(similarity: Floats, relevant: NDArray[np.bool_]) -> Floats:
    return np.where(relevant, similarity, np.array(-np.inf, dtype=similarity.dtype))


def _before(similarity: Floats, best: Floats, relevant: NDArray[np.bool_], ties: Ties) -> NDArray[np.bool_]:
    """Which candidates that are not relevant rank before the best relevant one."""
    # Negated comparisons are true of what is no number.
    behind = similarity < best if ties == "against" else similarity <= best
    return np.asarray(~behind & ~relevant)


def recall_at(ranks: NDArray[Any], k: int) -> float:
    """The share of queries with a rank of at most k.

    Args:
        ranks: ``[Q]``, from 1; infinite where nothing was found.
        k: Number of places.
    """
    return float(np.mean(ranks <= k))


def recalls(ranks: NDArray[Any], places: Sequence[int] = PLACES) -> dict[int, float]:
    """``recall_at`` each of ``places``."""
    return {k: recall_at(ranks, k) for k in places}


def median_rank(ranks: NDArray[Any]) -> float:
    """The median rank (MedR): the mean of the two middle ones if the number of queries is even."""
    return float(np.median(ranks))


def chance_of(counts: NDArray[Any], candidates: int, k: int) -> float:
    """Expected recall at k of a random order: ``1 - prod_{i<k} (C - r - i) / (C - i)``, averaged over queries.

    Args:
        counts: ``[Q]``, relevant candidates of each query.
        candidates: C.
        k: Number of places.
    """
    misses = candidates - np.asarray(counts, dtype=np.float64)
    probability = np.ones_like(misses)
    for place in range(min(k, candidates)):
        probability = probability * (misses - place).clip(min=0) / (candidates - place)
    return float((1 - probability).mean())


def folds_of(count: int, size: int) -> list[slice]:
    """Folds of pictures that follow each other: COCO's "1K", five folds of the 5,000 test pictures.

    Each fold is ranked by itself, its pictures with all of their captions. A figure is the mean of the folds' figures.

    Args:
        count: Number of pictures, in the order of the split.
        size: Pictures of a fold.

    Raises:
        DataError: The number of pictures is no multiple of ``size``.
    """
    if count == 0 or count % size:
        raise DataError(f"{count} pictures cannot be cut into folds of {size}; give a multiple")
    return [slice(start, start + size) for start in range(0, count, size)]


def values_of_folds(values: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """The values of all queries, weighted so that their mean is the mean of the folds' means.

    Folds may differ in their number of captions.

    Args:
        values: Of each fold, the values of its queries, at least one.
    """
    whole = sum(len(one) for one in values)
    return np.concatenate([np.asarray(one, dtype=np.float64) * (whole / len(values) / len(one)) for one in values])
