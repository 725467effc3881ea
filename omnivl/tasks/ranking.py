"""Scores of retrieval: recalls with chance and baseline, and the median rank. Also what is found for each query.

Shapes: Q queries, C candidates.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omnivl.inference.pictures import PictureSet
from omnivl.tasks.results import Gallery, GalleryRow, Score, evenly, mean_score
from omnivl.tasks.scorers.recall import (
    PLACES,
    Ranked,
    Relevance,
    Rows,
    best_ranks,
    chance_of,
    median_rank,
    recall_at,
    values_of_folds,
)

LOWER_RANKS = ("* median rank",)
"""Those of the metrics of ``scores_of_ranks`` of which less is better."""


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


def first_texts(
    texts: Sequence[str], rows: Rows, relevance: Relevance, most: int = PLACES[-1]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The texts that are found for each query, and what is right.

    Args:
        texts: The candidates.
        rows: The similarity matrix by its rows.
        relevance: What is relevant.
        most: How many texts are named.

    Yields:
        ``texts`` and their ``scores``, the most similar first; and ``truth``, all relevant texts, the ``rank`` of the
        best of them from 1, and whether it is the first one, ``right``.
    """
    for part in relevance.blocks():
        block, own = rows(part), relevance.candidates[part]
        ranks, best = best_ranks(block, relevance.rows(part)), torch.from_numpy(block).topk(min(most, len(texts)))
        found = zip(best.indices.tolist(), best.values.tolist(), ranks.tolist(), own, strict=True)
        for columns, scores, rank, relevant in found:
            right = {"truth": [texts[one] for one in relevant], "rank": rank, "right": rank == 1}
            yield {"texts": [texts[one] for one in columns], "scores": scores}, right


def found_galleries(
    name: str,
    media: str,
    pictures: PictureSet,
    texts: Sequence[str],
    relevance: Relevance,
    rows: tuple[Rows, Rows],
    most: int,
) -> tuple[Gallery, ...]:
    """Evenly chosen queries of both directions with their first five answers; none for ``most`` 0.

    Args:
        name: Name of the task.
        media: What the pictures are.
        pictures: The pictures.
        texts: The texts.
        relevance: Which texts belong to each picture.
        rows: The similarity matrix by its rows, and by its columns.
        most: Number of queries of each direction.
    """
    of_pictures, of_texts = rows

    def best(rows: Rows, query: int) -> list[int]:
        (row,) = torch.from_numpy(rows(slice(query, query + 1)))
        return row.topk(min(5, len(row))).indices.tolist()  # type: ignore[no-any-return]

    from_pictures, from_texts = [], []
    for i in evenly(len(pictures), most):
        found = best(of_pictures, i)
        from_pictures.append(
            GalleryRow(
                query_text=texts[relevance.candidates[i][0]],
                query_image=pictures.thumbnail(i),
                answer_texts=tuple(texts[j] for j in found),
                answer_images=("",) * len(found),
                correct=tuple(j in relevance.candidates[i] for j in found),
            )
        )
    for j in evenly(len(texts), most):
        found = best(of_texts, j)
        from_texts.append(
            GalleryRow(
                query_text=texts[j],
                query_image="",
                answer_texts=tuple(texts[relevance.candidates[i][0]] for i in found),
                answer_images=tuple(pictures.thumbnail(i) for i in found),
                correct=tuple(j in relevance.candidates[i] for i in found),
            )
        )
    titled = ((f"{name}: {media} to text", from_pictures), (f"{name}: text to {media}", from_texts))
    return tuple(Gallery(title, tuple(own)) for title, own in titled if own)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
