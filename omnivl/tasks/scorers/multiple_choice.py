"""Choices among options, and VCR's three accuracies.

Source: Zellers et al., arXiv 1811.10830, section 6; models/eval_q2ar.py of github.com/rowanz/r2c.
Differs: a question with a score that is no number counts as wrong.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class VCRHits(NamedTuple):
    """What is right of each question; accuracies are the means.

    Attributes:
        answer: Q->A, bool ``[N]``.
        rationale: QA->R, with the right answer given, bool ``[N]``.
        joint: Q->AR: both.
    """

    answer: NDArray[np.bool_]
    rationale: NDArray[np.bool_]
    joint: NDArray[np.bool_]


def is_right(scores: NDArray[Any], option: Sequence[int] | NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the option with the largest score is the right one; of ties the first.

    Args:
        scores: float ``[N, options]``.
        option: The right one of each question, int ``[N]``.

    Returns:
        bool ``[N]``.
    """
    return np.asarray((scores.argmax(axis=1) == np.asarray(option)) & ~np.isnan(scores).any(axis=1))


def vcr_hits(
    answers: NDArray[Any],
    rationales: NDArray[Any],
    option: Sequence[int] | NDArray[Any],
    rationale: Sequence[int] | NDArray[Any],
) -> VCRHits:
    """VCR's hits.

    The joint accuracy, too, is of rationales scored with the right answer: where the chosen answer is wrong, the
    question is wrong anyway.

    Args:
        answers: Scores of the answers, float ``[N, 4]``.
        rationales: Scores of the rationales, given the right answer, float ``[N, 4]``.
        option: The right answers, int ``[N]``.
        rationale: The right rationales, int ``[N]``.
    """
    answer, reason = is_right(answers, option), is_right(rationales, rationale)
    return VCRHits(answer, reason, answer & reason)
