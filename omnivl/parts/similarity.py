"""Similarity of samples by their embeddings; a sample may have several.

Shapes: N and K samples, M embeddings of a sample, P projection size.
"""

from torch import Tensor


def similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of embeddings (cosines if they are L2-normalised), ``[N, K]``.

    Args:
        queries: ``[N, P]``, or ``[N, M, P]``: then the largest product over the embeddings of a sample counts.
        keys: ``[K, P]``, or ``[K, M, P]``, likewise.

    Source: Li et al., BLIP-2, arXiv 2301.12597, section 3.2 (the largest over the queries of an image).
    """
    if queries.dim() == keys.dim() == 2:
        return queries @ keys.t()
    several = [one if one.dim() == 3 else one[:, None] for one in (queries, keys)]
    (rows, own, _), (columns, other, _) = (one.shape for one in several)
    products = several[0].flatten(0, 1) @ several[1].flatten(0, 1).t()
    return products.view(rows, own, columns, other).amax((1, 3))
