"""Stochastic depth: leaves out a block's branch for whole rows of the batch.

Draws come from torch's own generator: its state is part of a checkpoint, and activation recomputation restores it.
Source: Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382.
"""

import torch
from torch import Tensor


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zeroes whole rows of ``x [R, ...]`` with probability ``rate`` and scales the rest by ``1 / (1 - rate)``."""
    if rate == 0.0 or not training:
        return x
    keep = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1.0 - rate))


def drop_path_rates(last: float, num_layers: int) -> list[float]:
    """Rates rising linearly from 0 in the first block to ``last`` in the last one."""
    return [last * index / max(num_layers - 1, 1) for index in range(num_layers)]
