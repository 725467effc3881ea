"""Bootstrap intervals."""

import math

import numpy as np
import pytest

from omnivl.errors import DataError
from omnivl.tasks.scorers import confidence
from omnivl.tasks.scorers.confidence import interval


def test_it_is_as_wide_as_the_normal_one_for_many_queries() -> None:
    values = np.random.default_rng(0).random(2000) < 0.3
    low, high = interval(values, "vqa accuracy", resamples=4000)
    mean, error = values.mean(), math.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_queries_of_one_picture_count_as_one_draw() -> None:
    """Ten equal queries of each picture tell as much as one: the interval is that of the pictures."""
    pictures = (np.random.default_rng(1).random(400) < 0.5).astype(float)
    values, clusters = np.repeat(pictures, 10), np.repeat(np.arange(400), 10)
    alone = interval(pictures, "figure")
    assert interval(values, "figure", clusters.tolist()) == pytest.approx(alone)
    blind = interval(values, "figure")
    ratio = (alone.high - alone.low) / (blind.high - blind.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.1)


def test_large_pictures_weigh_by_their_queries() -> None:
    """Two pictures, one with a wrong query, one with three right ones: means of 0, 3/4 and 1 are drawn."""
    drawn = interval([0, 1, 1, 1], "figure", ["a", "b", "b", "b"], level=0.4)
    assert drawn == (0.75, 0.75), "half of the draws have both"


def test_the_name_seeds_it() -> None:
    values = np.random.default_rng(2).random(50)
    assert interval(values, "a") == interval(values, "a")
    assert interval(values, "a") != interval(values, "b")
    # Whatever the process's hash seed: the interval belongs into a report.
    assert interval([0.0, 1.0, 1.0, 0.0, 1.0], "vqa accuracy") == (0.2, 1.0)


def test_draws_in_parts_have_the_same_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(500)
    whole = interval(values, "a", resamples=3000)
    monkeypatch.setattr(confidence, "_LARGEST_DRAW", 500 * 7)
    parts = interval(values, "a", resamples=3000)
    assert parts == whole, "a generator's numbers do not depend on how many are asked for at a time"


def test_one_query_and_constant_values_have_no_width() -> None:
    assert interval([0.5], "a") == (0.5, 0.5)
    assert interval([1.0] * 9, "a") == (1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_have_to_be_numbers(values: list[float]) -> None:
    with pytest.raises(DataError, match="a: an interval needs values that are finite numbers, at least one"):
        interval(values, "a")
