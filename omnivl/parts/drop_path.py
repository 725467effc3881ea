"""Stochastic depth: leaves out a block's branch for whole rows of the batch.

Draws come from torch's own generator: its state is part of a checkpoint, and activation recomputation restores it.
Source: Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382.
"""

import torch
from torch import Tensor

from omnivl.parts.padding import Padding


def drop_path(x: Tensor, rate: float, training: bool, padding: Padding | None = None) -> Tensor:
    """Zeroes whole rows of ``x [R, ...]`` with probability ``rate`` and scales the rest by ``1 / (1 - rate)``.

    With ``padding``, ``x [n, D]`` are the kept positions of its rows.
    """
    if rate == 0.0 or not training:
        return x
    rows = x.shape[0] if padding is None else padding.rows
    keep = torch.rand((rows,) + (1,) * (x.dim() - 1), device=x.device) >= rate
    if padding is not None:
        keep = keep.index_select(0, padding.index // padding.length)
    return x * (keep.to(x.dtype) / (1.0 - rate))


def drop_path_rates(last: float, num_layers: int) -> list[float]:
    """Rates rising linearly from 0 in the first block to ``last`` in the last one."""
    return [last * index / max(num_layers - 1, 1) for index in range(num_layers)]
