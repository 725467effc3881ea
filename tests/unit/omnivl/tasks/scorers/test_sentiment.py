"""Scores of sentiment, by hand and as scikit-learn has them."""

import math

import numpy as np
import pytest

from omnivl.tasks.scorers.sentiment import correlation, f1_2, is_right_7, positive, sentiment_scores


@pytest.mark.parametrize(
    ("predicted", "truth", "right"),
    [
        (0.5, 0.0, True),  # halves go to the even number
        (1.5, 2.0, True),
        (2.5, 2.0, True),
        (-0.5, 0.0, True),
        (7.0, 3.0, True),  # cut off
        (2.4, 3.0, False),
        (1.0, 1.4, True),
    ],
)
def test_seven_classes(predicted: float, truth: float, right: bool) -> None:
    assert is_right_7([predicted], [truth]).tolist() == [right]


# has0: predictions + - + + -, labels + + - + -.  non0 (without the label 0): - + + -, labels + - + -.
PREDICTED, TRUTH = [0.0, -0.5, 0.2, 1.0, -2.0], [0.0, 1.0, -1.0, 2.0, -1.0]


def test_scores() -> None:
    found = sentiment_scores(PREDICTED, TRUTH)
    assert found["MAE"] == pytest.approx((0 + 1.5 + 1.2 + 1 + 1) / 5)
    assert found["correlation"] == pytest.approx(float(np.corrcoef(PREDICTED, TRUTH)[0, 1]))
    assert found["Acc-7"] == pytest.approx(1 / 5)
    assert found["Acc-2 has0"] == pytest.approx(3 / 5)
    assert found["Acc-2 non0"] == pytest.approx(2 / 4)
    # has0: + is in 3 predictions and 3 labels, 2 in common: 4 / 6; -: 2 and 2, 1: 2 / 4. Weights 3 and 2.
    assert found["F1 has0"] == pytest.approx((3 * 4 / 6 + 2 * 2 / 4) / 5)
    assert found["F1 non0"] == pytest.approx(0.5)


def test_zero_is_positive_or_left_out() -> None:
    ours, theirs = positive([0.0, 0.1, 0.0], [0.0, 0.0, 1.0], "has0")
    assert ours.tolist() == theirs.tolist() == [True, True, True]
    ours, theirs = positive([0.0, 0.1, 0.0], [0.0, 0.0, 1.0], "non0")
    assert (ours.tolist(), theirs.tolist()) == ([False], [True]), "a prediction of 0 is not positive there"


def test_swapped_arguments_weigh_by_predictions() -> None:
    predicted, truth = [1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, -1.0]
    # +: 3 predictions, 1 label, 1 in common: 2 / 4. -: 1, 3, 1: 2 / 4.
    assert f1_2(predicted, truth, "non0") == f1_2(predicted, truth, "non0", swapped=True) == 0.5
    predicted, truth = [1.0, 1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0, -1.0]
    # +: 4, 2, 2: 4 / 6. -: 1, 3, 1: 2 / 4. Labels weigh 2 and 3, predictions 4 and 1.
    assert f1_2(predicted, truth, "non0") == pytest.approx((2 * 4 / 6 + 3 * 2 / 4) / 5)
    assert f1_2(predicted, truth, "non0", swapped=True) == pytest.approx((4 * 4 / 6 + 1 * 2 / 4) / 5)
    assert sentiment_scores(predicted, truth, swapped=True)["F1 non0"] == f1_2(predicted, truth, "non0", swapped=True)


def test_what_cannot_be_told_is_no_number() -> None:
    assert math.isnan(correlation([1.0, 1.0], [1.0, 2.0]))
    found = sentiment_scores([1.0, -1.0], [0.0, 0.0])
    assert math.isnan(found["Acc-2 non0"]) and math.isnan(found["F1 non0"])


@pytest.mark.parametrize("swapped", [False, True])
def test_f1_is_that_of_scikit_learn(swapped: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is no requirement; it checks the weighted F1")
    random = np.random.default_rng(3)
    for _ in range(20):
        predicted, truth = random.normal(size=40).round(1), random.integers(-1, 2, size=40)
        for zeros in ("has0", "non0"):
            ours, theirs = positive(predicted, truth, zeros)
            sides = (ours, theirs) if swapped else (theirs, ours)
            expected = metrics.f1_score(*sides, average="weighted")
            assert f1_2(predicted, truth, zeros, swapped) == pytest.approx(expected)
