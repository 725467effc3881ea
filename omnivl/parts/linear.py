"""Parameterised maps that follow the dtype of their input: fp32 parameters, activations in the compute dtype."""

from moe.linear import LayerNorm, Linear, Role, linear

__all__ = ["LayerNorm", "Linear", "Role", "linear"]
