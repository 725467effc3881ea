"""VisDial: ranks of the right answer among the options of a round, and NDCG by dense relevance.

Source: Das et al., arXiv 1611.08669, section 5 (ranks); visdial.org/challenge (NDCG); visdialch/metrics.py of
    github.com/batra-mlp-lab/visdial-challenge-starter-pytorch.
Differs: among equal scores the official ranks follow its sort; here ``ties`` of ``recall`` says how the right answer
    ranks, and NDCG takes equal options in their order. A round without a relevant option, NaN there, is refused.

Shapes: N rounds, C options (100).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError
from omnivl.tasks.scorers.recall import Relevance, Ties, ranks_of


def answer_ranks(
    scores: NDArray[Any], option: Sequence[int] | NDArray[Any], ties: Ties = "against"
) -> NDArray[np.int64]:
    """The rank of the right answer of each round.

    Args:
        scores: float ``[N, C]``, larger is better.
        option: Columns of the right answers, int ``[N]``.
        ties: See ``recall``.

    Returns:
        int64 ``[N]``, from 1.
    """
    relevance = Relevance(tuple((int(one),) for one in option), scores.shape[1])
    return ranks_of(lambda part: scores[part], relevance, ties)


def ndcg(scores: NDArray[Any], relevance: NDArray[Any]) -> NDArray[np.float64]:
    """NDCG of each round; the figure is the mean.

    ``DCG_k / ideal DCG_k`` with ``DCG_k = sum_{i<k} relevance_i / log2(i + 2)`` over the k options of the largest
    scores, where k is the number of options with a relevance other than 0; the ideal one over those of the largest
    relevance.

    Args:
        scores: float ``[N, C]``.
        relevance: float ``[N, C]``.

    Returns:
        float64 ``[N]``.

    Raises:
        DataError: A round has no relevant option.
    """
    relevance = np.asarray(relevance, dtype=np.float64)
    counts = np.count_nonzero(relevance, axis=1)
    if not counts.all():
        where = int(np.flatnonzero(counts == 0)[0])
        raise DataError(f"round {where} has no option with a relevance other than 0, so that it has no NDCG")
    order = np.argsort(-np.asarray(scores, dtype=np.float64), axis=1, kind="stable")
    counted = np.arange(relevance.shape[1]) < counts[:, None]
    discounts = counted / np.log2(np.arange(relevance.shape[1]) + 2)
    gains = (np.take_along_axis(relevance, order, axis=1) * discounts).sum(axis=1)
    ideal = (-np.sort(-relevance, axis=1) * discounts).sum(axis=1)
    return np.asarray(gains / ideal)
