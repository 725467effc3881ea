"""Scores of ranks."""

import numpy as np
import pytest

from omnivl.tasks.ranking import first_texts, metrics_of, scores_of_ranks
from omnivl.tasks.scorers import recall
from omnivl.tasks.scorers.recall import Ranked, Relevance


def test_scores_of_folds_are_means_over_folds() -> None:
    two = Ranked(np.array([1, 4]), Relevance(((0,), (1,)), 4))
    four = Ranked(np.array([1, 2, 7, 8]), Relevance(((0,),) * 4, 8))
    scores = scores_of_ranks("r", "image->text", [two, four])
    assert tuple(score.metric for score in scores) == metrics_of("image->text")
    assert [score.value for score in scores] == [pytest.approx(v) for v in (3 / 8, 3 / 4, 1.0, (2.5 + 4.5) / 2)]
    assert [score.chance for score in scores] == [
        pytest.approx((1 / 4 + 1 / 8) / 2),
        pytest.approx((1 + 5 / 8) / 2),
        pytest.approx(1.0),
        None,
    ]
    assert {score.count for score in scores} == {6}
    assert [score.graded for score in scores] == [True, True, True, False], "a lower median rank is better"


def test_a_baseline_and_what_queries_share() -> None:
    found = Ranked(np.tile([1, 9], 20), Relevance(((0,),) * 40, 20))
    plain = scores_of_ranks("r", "text->image", [found], baseline=np.full(40, 2))
    assert [score.baseline for score in plain] == [0.0, 1.0, 1.0, 2.0]
    # Queries come in pairs of one right and one wrong: by pair there is nothing that varies.
    shared = scores_of_ranks("r", "text->image", [found], clusters=[place // 2 for place in range(40)])
    assert shared[0].interval == (0.5, 0.5)
    assert plain[0].interval is not None
    assert plain[0].interval[0] < 0.4


def test_first_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most similar first; the rank is of the best of several right ones, and ties are against it."""
    similarity = np.array([[0.1, 0.5, 0.3], [0.2, 0.4, 0.6], [0.7, 0.1, 0.7]], dtype=np.float32)
    relevance = Relevance(((0, 2), (2,), (0,)), 3)
    whole = list(first_texts(("a", "b", "c"), similarity.__getitem__, relevance, most=2))
    assert [one["texts"] for one, _ in whole[:2]] == [["b", "c"], ["c", "b"]] and set(whole[2][0]["texts"]) == {
        "a",
        "c",
    }
    assert np.array([one["scores"] for one, _ in whole]) == pytest.approx(
        np.array([[0.5, 0.3], [0.6, 0.4], [0.7, 0.7]])
    )
    assert [right for _, right in whole] == [
        {"truth": ["a", "c"], "rank": 2, "right": False},
        {"truth": ["c"], "rank": 1, "right": True},
        {"truth": ["a"], "rank": 2, "right": False},
    ]
    monkeypatch.setattr(recall, "LARGEST_BLOCK", 3)
    assert list(first_texts(("a", "b", "c"), similarity.__getitem__, relevance, most=2)) == whole, "row by row"
    assert len(next(first_texts(("a", "b", "c"), similarity.__getitem__, relevance))[0]["texts"]) == 3
