"""Ranks and recalls of retrieval."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omnivl.errors import DataError
from omnivl.tasks.scorers import recall
from omnivl.tasks.scorers.recall import (
    Relevance,
    Rows,
    best_ranks,
    chance_of,
    folds_of,
    median_rank,
    ranks_both_ways,
    ranks_of,
    recall_at,
    recalls,
    values_of_folds,
)


def rows_of(similarity: NDArray[Any]) -> Rows:
    return lambda part: similarity[part]


def ranks(similarity: NDArray[Any], relevant: list[list[int]], **more: Any) -> list[int]:
    relevance = Relevance(tuple(map(tuple, relevant)), similarity.shape[1])
    return ranks_of(rows_of(similarity), relevance, **more).tolist()


def test_a_rank_is_the_number_of_better_candidates_and_one() -> None:
    similarity = np.array([[0.3, 0.9, 0.5], [0.1, 0.2, 0.3]])
    assert ranks(similarity, [[0], [2]]) == [3, 1]


def test_ranks_and_recalls_worked_out_by_hand() -> None:
    # Query 0: order 2, 0, 1; relevant 0 -> one candidate before it. Query 1: relevant 1 and 2, of which 1 is first.
    similarity = np.array([[0.5, 0.1, 0.9], [0.2, 0.8, 0.3]])
    relevant = np.array([[True, False, False], [False, True, True]])
    assert best_ranks(similarity, relevant).tolist() == [2, 1]
    assert recalls(best_ranks(similarity, relevant), (1, 2)) == {1: 0.5, 2: 1.0}


def test_ties() -> None:
    similarity = np.array([[0.5, 0.5, 0.5, 0.1]])
    assert ranks(similarity, [[1]]) == [3], "against the query"
    assert ranks(similarity, [[1]], ties="for") == [1]
    assert ranks(similarity, [[0, 1, 2]]) == [1], "relevant candidates do not stand in each other's way"


def test_a_collapsed_model_scores_nothing() -> None:
    found = best_ranks(np.ones((4, 4)), np.eye(4, dtype=bool))
    assert found.tolist() == [4, 4, 4, 4]
    assert recall_at(found, 1) == 0.0


@pytest.mark.parametrize("ties", ["against", "for"])
def test_what_is_no_number_ranks_first_if_wrong_and_last_if_right(ties: str) -> None:
    similarity = np.array([[0.5, np.nan, 0.1]])
    assert ranks(similarity, [[0]], ties=ties) == [2]
    assert ranks(similarity, [[1]], ties=ties) == [3]
    assert ranks_both_ways(rows_of(similarity.T), Relevance(((0,), (0,), (0,)), 1), ties)[1].tolist() == [1]  # type: ignore[arg-type]
    of_column = ranks_both_ways(rows_of(np.array([[np.nan, 0.0], [0.0, 1.0]])), Relevance(((0,), (1,)), 2), ties)  # type: ignore[arg-type]
    assert of_column[1].tolist() == [2, 1]


def test_a_query_without_a_relevant_candidate_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="every query needs a relevant candidate"):
        best_ranks(np.zeros((1, 2)), np.zeros((1, 2), dtype=bool))


@pytest.mark.parametrize("ties", ["against", "for"])
@pytest.mark.parametrize("largest", [1, 40, 200, 1 << 24])
@pytest.mark.parametrize("queries", [1, 7, 60])
def test_blocks_rank_as_the_whole_matrix_does(
    monkeypatch: pytest.MonkeyPatch, largest: int, queries: int, ties: Any
) -> None:
    monkeypatch.setattr(recall, "LARGEST_BLOCK", largest)
    random = np.random.default_rng(queries)
    columns = 20
    # Rounded, so that some candidates are equally similar.
    similarity = random.standard_normal((queries, columns)).round(1).astype(np.float32)
    relevant = random.random((queries, columns)) < 0.2
    relevant[np.arange(columns) % queries, np.arange(columns)] = True
    relevant[np.arange(queries), np.arange(queries) % columns] = True
    asked = []

    def rows(part: slice) -> NDArray[Any]:
        asked.append(part.stop - part.start)
        return similarity[part]

    relevance = Relevance(tuple(tuple(np.flatnonzero(row).tolist()) for row in relevant), columns)
    ours, others = ranks_both_ways(rows, relevance, ties)
    assert ours.tolist() == best_ranks(similarity, relevant, ties).tolist()
    assert others.tolist() == best_ranks(similarity.T, relevant.T, ties).tolist()
    assert max(asked) <= max(1, largest // columns)
    assert sum(asked) == 2 * queries, "each row twice"
    transposed = relevance.transposed()
    assert ranks_of(rows_of(similarity.T), transposed, ties).tolist() == others.tolist()
    assert relevance.counts().tolist() == relevant.sum(1).tolist()
    assert transposed.counts().tolist() == relevant.sum(0).tolist()


def test_a_picture_takes_the_best_rank_of_its_captions() -> None:
    # Two pictures with two and three captions; rows are pictures.
    similarity = np.array([[0.2, 0.8, 0.9, 0.1, 0.0], [0.7, 0.6, 0.3, 0.5, 0.4]])
    to_text, to_image = ranks_both_ways(rows_of(similarity), Relevance(((0, 1), (2, 3, 4)), 5))
    assert to_text.tolist() == [2, 3]  # 0.8 behind 0.9; 0.5 behind 0.7 and 0.6
    assert to_image.tolist() == [2, 1, 2, 1, 1]


def test_recalls_and_medians() -> None:
    ranks = np.array([1, 2, 5, 11])
    assert recalls(ranks) == {1: 0.25, 5: 0.75, 10: 0.75}
    assert recall_at(np.array([np.inf, 1.0]), 10) == 0.5
    assert median_rank(ranks) == 3.5
    assert median_rank(ranks[:3]) == 2.0


def test_chance_by_hand_and_by_simulation() -> None:
    # One relevant of four: 1/4 at 1, 2/4 at 2. Two relevant of four: 1 - (2/4)(1/3) = 5/6 at 2.
    assert chance_of(np.array([1]), 4, 1) == pytest.approx(0.25)
    assert chance_of(np.array([1]), 4, 2) == pytest.approx(0.5)
    assert chance_of(np.array([2]), 4, 2) == pytest.approx(5 / 6)
    assert chance_of(np.array([2]), 4, 4) == pytest.approx(1.0)
    relevant = np.tile([True, True, False, False], (20_000, 1))
    simulated = recall_at(best_ranks(np.random.default_rng(0).random((20_000, 4)), relevant), 2)
    assert simulated == pytest.approx(5 / 6, abs=0.01)


def test_folds_have_their_own_candidates_alone() -> None:
    """Six texts: 0 and 5 belong to pictures of both folds."""
    relevance = Relevance(((5, 0), (1,), (2, 3), (0, 4, 5)), 6, per_value=3)
    assert folds_of(4, 2) == [slice(0, 2), slice(2, 4)]
    first, kept = relevance.within(slice(0, 2))
    assert kept == [0, 1, 5]
    assert first == Relevance(((2, 0), (1,)), 3, per_value=3)
    second, kept = relevance.within(slice(2, 4))
    assert kept == [0, 2, 3, 4, 5]
    assert second.candidates == ((1, 2), (0, 3, 4))
    with pytest.raises(DataError, match="3 pictures cannot be cut into folds of 2"):
        folds_of(3, 2)


def test_folds_count_equally_whatever_their_number_of_captions() -> None:
    # Means 1/2 and 1/4 of folds with two and four queries: 3/8, where all queries together have 2/6.
    values = values_of_folds([np.array([True, False]), np.array([True, False, False, False])])
    assert values.mean() == pytest.approx(3 / 8)
    assert values_of_folds([np.array([True, False])]).tolist() == [1.0, 0.0], "one fold as it is"
