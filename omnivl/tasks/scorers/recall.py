"""Ranks and recalls of retrieval from a similarity matrix, by the protocols of COCO, Flickr30K and MSR-VTT.

Ranks count from 1. Where nothing ties, a rank is the number of candidates that are strictly more similar, plus 1.
Among ties the rule is ``ties``:

- ``against`` the query, as ``omnivl.tasks.ranking`` has it: an equally similar wrong candidate ranks before the right
  one, so that a model that maps everything to one point scores zero;
- ``for`` the query: strictly greater + 1, as many published programs count; the same model then scores one.

A similarity that is no number ranks before everything, and a right candidate without one behind everything.

Source: Karpathy and Fei-Fei, arXiv 1412.2306 (splits, five captions a picture); VSE++, arXiv 1707.05612, whose
    evaluation defines the folds; CLIP4Clip, arXiv 2104.08860.
Differs: those programs sort, and look up where the right candidate lies; among ties that depends on the sort.
    CLIP4Clip's looks up equal values instead, so that ties give it more ranks than queries. VSE++ takes the floor of
    the median rank.

Shapes: Q queries, C candidates.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError

PLACES = (1, 5, 10)
"""Numbers of places at which recall is reported."""

Ties = Literal["against", "for"]
Floats = NDArray[np.floating[Any]]


def ranks_of(similarity: Floats, relevant: Sequence[Sequence[int]], ties: Ties = "against") -> NDArray[np.int64]:
    """The rank of the best relevant candidate of each query among those that are not relevant.

    Args:
        similarity: float ``[Q, C]``, larger is better.
        relevant: Of each query the columns of its relevant candidates, at least one.
        ties: See the top of this file.

    Returns:
        int64 ``[Q]``, from 1.
    """
    found = np.empty(len(similarity), dtype=np.int64)
    for query, (row, own) in enumerate(zip(similarity, relevant, strict=True)):
        columns = np.unique(np.asarray(own, dtype=np.int64))
        assert columns.size, "every query needs a relevant candidate"
        best = row[columns].max()
        # Negated comparisons are true of what is no number.
        before = ~(row < best) if ties == "against" else ~(row <= best)
        found[query] = before.sum() - before[columns].sum() + 1
    return found


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


def ranks_both_ways(
    similarity: Floats, image_of: Sequence[int], ties: Ties = "against"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks of pictures with several captions each, both ways.

    A picture finds its texts at the best rank of any of its captions; each caption is a query for its one picture.

    Args:
        similarity: float ``[pictures, captions]``.
        image_of: Of each caption the row of its picture; every picture has a caption.
        ties: See the top of this file.

    Returns:
        int64 ``[pictures]``, image to text, and int64 ``[captions]``, text to image; from 1.

    Raises:
        DataError: A picture has no caption.
    """
    own: list[list[int]] = [[] for _ in range(len(similarity))]
    for caption, image in enumerate(image_of):
        own[image].append(caption)
    if bare := [image for image, captions in enumerate(own) if not captions]:
        raise DataError(f"{len(bare)} of {len(own)} pictures have no caption, the first at row {bare[0]}")
    return ranks_of(similarity, own, ties), ranks_of(similarity.T, [[image] for image in image_of], ties)


def fold_recalls(
    similarity: Floats,
    image_of: Sequence[int],
    size: int = 1000,
    places: Sequence[int] = PLACES,
    ties: Ties = "against",
) -> tuple[dict[int, float], dict[int, float]]:
    """Recalls within folds of the pictures, averaged: COCO's "1K", five folds of the 5,000 test pictures.

    A fold has ``size`` pictures that follow each other, with all of their captions.

    Args:
        similarity: float ``[pictures, captions]``, pictures in the order of the split.
        image_of: Of each caption the row of its picture.
        size: Pictures of a fold.
        places: Numbers of places.
        ties: See the top of this file.

    Returns:
        Recall at each place, image to text, and text to image.

    Raises:
        DataError: The number of pictures is no multiple of ``size``, or a picture has no caption.
    """
    if len(similarity) == 0 or len(similarity) % size:
        raise DataError(f"{len(similarity)} pictures cannot be cut into folds of {size}; give a multiple")
    images = np.asarray(image_of)
    to_text, to_image = [], []
    for start in range(0, len(similarity), size):
        captions = np.flatnonzero((images >= start) & (images < start + size))
        part = similarity[start : start + size][:, captions]
        ranks, of_captions = ranks_both_ways(part, (images[captions] - start).tolist(), ties)
        to_text.append(recalls(ranks, places))
        to_image.append(recalls(of_captions, places))
    return _mean_of(to_text), _mean_of(to_image)


def _mean_of(found: Sequence[dict[int, float]]) -> dict[int, float]:
    return {k: sum(one[k] for one in found) / len(found) for k in found[0]}
