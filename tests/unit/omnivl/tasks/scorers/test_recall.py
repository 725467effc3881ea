"""Ranks and recalls of retrieval."""

import numpy as np
import pytest
import torch

from omnivl.errors import DataError
from omnivl.tasks.ranking import best_rank
from omnivl.tasks.scorers.recall import fold_recalls, median_rank, ranks_both_ways, ranks_of, recall_at, recalls


def test_a_rank_is_the_number_of_better_candidates_and_one() -> None:
    similarity = np.array([[0.3, 0.9, 0.5], [0.1, 0.2, 0.3]])
    assert ranks_of(similarity, [[0], [2]]).tolist() == [3, 1]


def test_ties() -> None:
    similarity = np.array([[0.5, 0.5, 0.5, 0.1]])
    assert ranks_of(similarity, [[1]]).tolist() == [3], "against the query"
    assert ranks_of(similarity, [[1]], ties="for").tolist() == [1]
    assert ranks_of(similarity, [[0, 1, 2]]).tolist() == [1], "relevant candidates do not stand in each other's way"


@pytest.mark.parametrize("ties", ["against", "for"])
def test_what_is_no_number_ranks_first_if_wrong_and_last_if_right(ties: str) -> None:
    similarity = np.array([[0.5, np.nan, 0.1]])
    assert ranks_of(similarity, [[0]], ties).tolist() == [2]  # type: ignore[arg-type]
    assert ranks_of(similarity, [[1]], ties).tolist() == [3]  # type: ignore[arg-type]


def test_ranks_are_those_of_the_retrieval_task() -> None:
    random = np.random.default_rng(0)
    similarity = random.integers(0, 6, size=(50, 12)).astype(np.float32)
    relevant = random.random((50, 12)) < 0.2
    relevant[:, 0] = True
    ours = ranks_of(similarity, [np.flatnonzero(row).tolist() for row in relevant])
    theirs = best_rank(torch.from_numpy(similarity), torch.from_numpy(relevant))
    assert ours.tolist() == (theirs + 1).tolist()


def test_a_picture_takes_the_best_rank_of_its_captions() -> None:
    # Two pictures with two and three captions; rows are pictures.
    similarity = np.array([[0.2, 0.8, 0.9, 0.1, 0.0], [0.7, 0.6, 0.3, 0.5, 0.4]])
    to_text, to_image = ranks_both_ways(similarity, [0, 0, 1, 1, 1])
    assert to_text.tolist() == [2, 3]  # 0.8 behind 0.9; 0.5 behind 0.7 and 0.6
    assert to_image.tolist() == [2, 1, 2, 1, 1]


def test_recalls_and_medians() -> None:
    ranks = np.array([1, 2, 5, 11])
    assert recalls(ranks) == {1: 0.25, 5: 0.75, 10: 0.75}
    assert recall_at(np.array([np.inf, 1.0]), 10) == 0.5
    assert median_rank(ranks) == 3.5
    assert median_rank(ranks[:3]) == 2.0


def test_folds_rank_only_among_themselves() -> None:
    # Four pictures, a caption each, in two folds. Each picture's nearest caption is in the other fold, its own next.
    similarity = np.array(
        [[0.5, 0.1, 0.9, 0.9], [0.1, 0.5, 0.9, 0.9], [0.9, 0.9, 0.5, 0.1], [0.9, 0.9, 0.6, 0.5]], dtype=np.float32
    )
    whole, _ = ranks_both_ways(similarity, range(4))
    assert recalls(whole, (1,)) == {1: 0.0}
    to_text, to_image = fold_recalls(similarity, range(4), size=2, places=(1, 2))
    assert to_text == {1: (1 + 0.5) / 2, 2: 1.0}, "in the second fold 0.6 stands before 0.5"
    assert to_image == {1: (1 + 0.5) / 2, 2: 1.0}


def test_folds_keep_captions_with_their_pictures_whatever_their_order() -> None:
    similarity = np.eye(4)[:, [3, 0, 2, 1, 3]]
    assert fold_recalls(similarity, [3, 0, 2, 1, 3], size=2, places=(1,)) == ({1: 1.0}, {1: 1.0})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="3 pictures cannot be cut into folds of 2"):
        fold_recalls(np.eye(3), range(3), size=2)
    with pytest.raises(DataError, match="1 of 2 pictures have no caption, the first at row 1"):
        ranks_both_ways(np.eye(2)[:, :1], [0])
