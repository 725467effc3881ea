"""Re-ranking by a matching head: of the first texts of each picture, or of the first pictures of each text.

Shapes: Q queries, C candidates, K of them that are re-ranked.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.tasks.pairs import predict_pairs
from omnivl.tasks.scorers.recall import Floats, Relevance, Rows


def reranked(
    similar: Rows, relevance: Relevance, count: int, temperature: float, matching: Callable[[Tensor], Tensor]
) -> Rows:
    """Re-ranks the first candidates of each query by matching log odds plus cosine over temperature.

    The others follow in their old order.

    Args:
        similar: Cosines.
        relevance: Of the same queries and candidates.
        count: How many candidates are re-ranked.
        temperature: Divisor of the cosine.
        matching: Log odds of candidates int64 ``[Q, K]``, fp32 ``[Q, K]``.

    Source: ALBEF, arXiv 2107.07651, section 6.1 (re-ranking by matching score, both ways); BLIP, arXiv 2201.12086 (its
        code adds the similarity).
    Differs: the cosine is divided by a temperature, which puts it on the scale of log odds.
    """
    some = min(count, relevance.columns)
    blocks = [torch.from_numpy(similar(part)).topk(some, dim=1) for part in relevance.blocks()]
    values, candidates = torch.cat([one.values for one in blocks]), torch.cat([one.indices for one in blocks])
    score = (matching(candidates) + values / temperature).float().numpy()
    behind = score.min() - 1.0 - values.max().item()
    places = candidates.numpy()

    def rows(part: slice) -> Floats:
        block: Floats = similar(part) + behind
        np.put_along_axis(block, places[part], score[part], axis=1)
        return block

    return rows


def matching_of_texts(
    encoder: Encoder, objective: str, pictures: PictureSet, texts: Sequence[str], candidates: Tensor
) -> Tensor:
    """Log odds that texts match their candidate pictures, fp32 ``[Q, K]``.

    Args:
        encoder: A stage with the matching head.
        objective: Key of the head's objective.
        pictures: C pictures.
        texts: Q texts.
        candidates: int64 ``[Q, K]``, pictures of each text.
    """
    said = torch.arange(len(candidates)).repeat_interleave(candidates.shape[1])
    return predict_pairs(encoder, objective, pictures, texts, candidates.flatten(), said).view(candidates.shape)
