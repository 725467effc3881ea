"""VCR's accuracies."""

import numpy as np

from omnivl.tasks.scorers.multiple_choice import is_right, vcr_hits


def test_the_joint_accuracy_needs_both() -> None:
    answers = np.array([[0.1, 0.9, 0, 0], [0.9, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    rationales = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    found = vcr_hits(answers, rationales, option=[1, 0, 2, 0], rationale=[0, 1, 1, 0])
    assert found.answer.tolist() == [True, True, True, False]
    assert found.rationale.tolist() == [True, False, True, False]
    assert found.joint.tolist() == [True, False, True, False]


def test_of_ties_the_first_is_chosen_and_no_number_is_never_right() -> None:
    scores = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [np.nan, 0, 0, 0], [0, np.nan, 0, 1]])
    assert is_right(scores, [0, 1, 0, 3]).tolist() == [True, False, False, False]
