"""Parameterised maps that follow the dtype of their input: fp32 parameters, activations in the compute dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.linear import Linear, linear

__all__ = ["LayerNorm", "Linear", "linear"]


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with fp32 parameters, output in the input's dtype."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., D]``; mean and variance are taken in fp32 by the kernel."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
