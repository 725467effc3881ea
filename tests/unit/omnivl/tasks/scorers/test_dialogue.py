"""VisDial's scores, worked out by hand."""

import math

import numpy as np
import pytest

from omnivl.errors import DataError
from omnivl.tasks.scorers.dialogue import answer_ranks, ndcg


def test_ranks_are_counted_from_one() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert answer_ranks(scores, [0, 2]).tolist() == [1, 3]


def test_a_score_that_is_no_number_is_never_right() -> None:
    scores = np.array([[np.nan, 0.0, 0.0], [0.0, np.nan, 1.0]])
    assert (answer_ranks(scores, [0, 2]) > 1).all()


def test_ties_count_as_asked() -> None:
    scores = np.zeros((1, 100))
    assert answer_ranks(scores, [7]).tolist() == [100]
    assert answer_ranks(scores, [7], ties="for").tolist() == [1]


def test_ndcg_is_cut_off_at_the_number_of_relevant_options() -> None:
    relevance = np.array([[0.5, 0.0, 1.0, 0.0]])  # k is 2
    ideal = 1.0 / math.log2(2) + 0.5 / math.log2(3)
    # The order is 1, 2, 0, 3: of the first two one is relevant, at the second place.
    assert ndcg(np.array([[2.0, 4.0, 3.0, 1.0]]), relevance).tolist() == [pytest.approx(1 / math.log2(3) / ideal)]
    # The order is 0, 2: gains 0.5, then 1.
    assert ndcg(np.array([[4.0, 1.0, 3.0, 2.0]]), relevance)[0] == pytest.approx((0.5 + 1 / math.log2(3)) / ideal)
    assert ndcg(np.array([[3.0, 1.0, 4.0, 2.0]]), relevance)[0] == pytest.approx(1.0)


def test_ndcg_has_a_k_of_its_own_in_each_round() -> None:
    relevance = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    scores = np.array([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
    # k 1: option 1 first, not relevant. k 2: 1, then 2: 1 / (1 + 1 / log2(3)).
    assert ndcg(scores, relevance).tolist() == pytest.approx([0.0, 1 / (1 + 1 / math.log2(3))])


def test_equal_options_are_taken_in_their_order() -> None:
    assert ndcg(np.zeros((1, 3)), np.array([[0.0, 1.0, 0.0]])).tolist() == [0.0]
    assert ndcg(np.zeros((1, 3)), np.array([[1.0, 0.0, 0.0]])).tolist() == [1.0]


def test_a_round_without_a_relevant_option_is_refused() -> None:
    with pytest.raises(DataError, match="round 1 has no option with a relevance other than 0"):
        ndcg(np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]))
