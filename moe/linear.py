"""A linear map whose weights stay in fp32 and are cast to the activations' dtype on use.

Shapes: I inputs, O outputs; leading dimensions are free.

There is no autocast: the dtype of the activations alone decides in which precision a product runs. The backward pass
reads the weight from the *parameter*, not from the cast copy that the forward pass used. Under ZeRO-3 the parameter's
storage is freed after the forward pass and gathered again before the backward one, so a saved copy would keep every
weight of the model alive in between.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient ``[O, I]`` of a linear map's weight from ``grad [..., O]`` and its input ``x [..., I]``."""
    return (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(dtype)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient ``[O]`` of a bias from ``grad [..., O]``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)


class _CastLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` with fp32 parameters and activations of lower precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x, weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., I]`` times ``weight [O, I]`` transposed plus ``bias [O]``, computed in ``x.dtype``.

    Where dtypes agree this is ``torch.nn.functional.linear``.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    out: Tensor = _CastLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class Linear(nn.Module):
    """``nn.Linear`` with fp32 parameters that follows the dtype of its input.

    Weights start from a normal distribution of standard deviation 0.02 cut at two deviations, biases from zero, as in
    ViT and BERT.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, zero: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., I]`` to ``[..., O]`` in ``x.dtype``."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
