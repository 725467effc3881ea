"""How far a mean over queries could lie elsewhere by the choice of the queries alone.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (the percentile interval).
"""

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError

_LARGEST_DRAW = 1 << 22
"""Numbers that are drawn at a time, 32 MiB."""


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


def interval(
    values: Sequence[float] | NDArray[Any],
    figure: str,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> Interval:
    """The percentile bootstrap interval of a mean over queries.

    Queries that share a picture are no independent draws: with ``clusters`` whole pictures are drawn, each with all of
    its queries, and the mean is that over the queries drawn.

    Args:
        values: The value of each query, ``[N]``, N at least 1.
        figure: The figure's name, which seeds the draws: the same name and values give the same interval.
        clusters: The picture of each query, or whatever else its queries share.
        level: The share of resampled means inside.
        resamples: How often queries are drawn.

    Raises:
        DataError: There is no value, or one that is no finite number.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.size == 0 or not np.isfinite(given).all():
        raise DataError(f"{figure}: an interval needs values that are finite numbers, at least one")
    sums: NDArray[Any] = given
    sizes: NDArray[Any] = np.ones(len(given))
    if clusters is not None:
        numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
        place = np.array([numbers[cluster] for cluster in clusters])
        assert len(place) == len(given), "a cluster for each value"
        sums, sizes = np.bincount(place, weights=given), np.bincount(place, weights=np.ones(len(given)))
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(figure.encode()).digest()[:8], "big"))
    means: list[NDArray[np.float64]] = []
    at_once = max(1, _LARGEST_DRAW // len(sums))
    for start in range(0, resamples, at_once):
        drawn = random.integers(len(sums), size=(min(at_once, resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
