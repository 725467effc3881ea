"""Parameterised maps that follow the dtype of their input, and their starting values.

Parameters are fp32, activations have the compute dtype.
"""

from torch import Tensor, nn

from moe.linear import LayerNorm, Linear, Role, linear

__all__ = ["LayerNorm", "Linear", "Role", "draw_normal", "linear"]


def draw_normal(weight: Tensor, std: float) -> None:
    """Draws a weight from a normal distribution around 0. One without storage is left alone.

    For a tensor without storage ``nn.init.normal_`` would import torch's compiler (2 s), which a plan that is only
    checked never needs.
    """
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
