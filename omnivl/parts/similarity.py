"""Similarity of samples by their embeddings; a sample may have several.

Shapes: N and K samples, M embeddings of a sample, P projection size.
"""

from typing import Any

import torch
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


class _UnitLength(torch.autograd.Function):
    """``x / |x|``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
        made: Tensor = x / length
        ctx.save_for_backward(made, length)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (made, length) = gradients, ctx.saved_tensors
        along = (gradient * (made / length)).sum(-1, keepdim=True)
        of_x: Tensor = gradient / length - along * made
        return of_x


def unit_length(x: Tensor) -> Tensor:
    """``x [..., P]``, L2-normalised: ``torch.nn.functional.normalize`` by half as many operations.

    Differs: a vector that is shorter than 1e-12 and not zero has the gradient of a longer one; there it is meaningless.
    """
    made: Tensor = _UnitLength.apply(x)  # type: ignore[no-untyped-call]
    return made
