"""Optimal transport between two sets of vectors, by the inexact proximal point method (IPOT).

Shapes: B pairs of sets, M vectors of one set, N of the other, D their size. Each set's mass is spread evenly.

Source: Xie et al., arXiv 1802.04307, algorithm 1; beta 0.5, 50 steps and one inner step as in UNITER (Chen et al.,
    arXiv 1909.11740, section 3.3) and ViLT (Kim et al., arXiv 2102.03334, section 3.3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of ``x [B, M, D]`` and ``y [B, N, D]``, fp32 ``[B, M, N]``."""
    x, y = (F.normalize(side.float(), dim=-1, eps=1e-5) for side in (x, y))
    return 1.0 - x @ y.transpose(1, 2)


@torch.no_grad()
def transport_plan(cost: Tensor, has_x: Tensor, has_y: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """The approximately cheapest transport plan: the mass that moves from each x to each y.

    Args:
        cost: ``[B, M, N]``, at least 0 each.
        has_x: bool ``[B, M]``, false where there is only padding.
        has_y: bool ``[B, N]``, likewise.
        beta: Weight of staying near the previous step's plan; a smaller one comes nearer to the optimum per step.
        iterations: Steps.

    Returns:
        fp32 ``[B, M, N]``. Rows sum to 1 over their number (without padding), columns likewise in the limit; zero at
        padding, and everywhere in a pair with an empty side.
    """
    pairs = (has_x[:, :, None] & has_y[:, None, :]).to(torch.float32)
    num_x, num_y = (side.sum(1, keepdim=True).clamp(min=1).to(torch.float32) for side in (has_x, has_y))
    kernel = torch.exp(-cost.float() / beta) * pairs
    plan, sigma = pairs, has_x.to(torch.float32) / num_x
    for _ in range(iterations):
        mixed = kernel * plan
        delta = _inverse(num_y * (sigma[:, None] @ mixed)[:, 0])
        sigma = _inverse(num_x * (mixed @ delta[:, :, None])[:, :, 0])
        plan = sigma[:, :, None] * mixed * delta[:, None]
    return plan


def transport_distance(x: Tensor, y: Tensor, has_x: Tensor, has_y: Tensor) -> Tensor:
    """The cost of the plan, fp32 ``[B]``, with a gradient to the vectors but not through the plan.

    Args:
        x: ``[B, M, D]``.
        y: ``[B, N, D]``.
        has_x: bool ``[B, M]``, false where there is only padding.
        has_y: bool ``[B, N]``, likewise.
    """
    cost = cosine_cost(x, y)
    return (cost * transport_plan(cost.detach(), has_x, has_y)).sum((1, 2))


def _inverse(x: Tensor) -> Tensor:
    """``1 / x`` where x is not 0, else 0."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny).reciprocal(), 0.0)
