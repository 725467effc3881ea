"""A linear map whose weights, in fp32 or frozen ones in bf16, are cast to the activations' dtype on use; layer norms.

Shapes: I inputs, O outputs; leading dimensions are free.

There is no autocast: the dtype of the activations alone decides in which precision a product runs. The cast weight is
kept for the backward pass, which takes 2 bytes a weight meanwhile. A host that gathers parameters only while they are
used, as ZeRO-3 does, marks them (``gather_on_use``): for those the backward pass casts the *parameter* again, which the
host frees after the forward pass and gathers again. With kept copies all weights of the model would be in memory
between the two passes.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.stacked import Stacked
from moe.working import is_gathered_on_use, note_use, working


@functools.cache
def _has_fused_bias() -> bool:
    """Whether torch has oneDNN's linear primitive for bf16 on this CPU."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., I] @ weight [O, I].T + bias [O]`` by the fastest kernel; all of one dtype, no gradient.

    On CPUs with bf16 instructions ``F.linear`` copies the bias over the whole result before it multiplies; oneDNN's
    linear primitive adds it when it writes the result, which was measured to be 15 to 25 % faster at 384 x 1536.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() > 0 and _has_fused_bias():
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return fused
    return F.linear(x, weight, bias)


class _CastLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` by ``product``, with parameters of any precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast if keep else weight)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return product(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            # Summed in the low precision's kernel, which accumulates in fp32: sum(dtype=fp32) would copy it all first.
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., I]`` times ``weight [O, I]`` transposed plus ``bias [O]``, computed in ``x.dtype``.

    Where dtypes agree this is ``torch.nn.functional.linear``.
    """
    if torch.compiler.is_compiling():  # the compiler fuses casts and chooses kernels itself
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    keep = not is_gathered_on_use(weight)
    for parameter in (weight, bias):
        if parameter is not None:
            note_use(parameter, x.dtype)
    if keep:
        weight, bias = working(weight, x.dtype), None if bias is None else working(bias, x.dtype)
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return F.linear(x, weight, bias)
    out: Tensor = _CastLinear.apply(x, weight, bias, keep)  # type: ignore[no-untyped-call]
    return out


class _LinearBeside(torch.autograd.Function):
    """``x @ weight.T + bias``, and ``x`` once more; what comes back for either is added within the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad, grad_beside = grads
        if grad is None:
            return grad_beside, None, None
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            own = weight.to(grad.dtype)
            if grad_beside is None:
                grad_x = (rows @ own).view(x.shape)
            else:
                grad_x = torch.addmm(grad_beside.reshape(-1, x.shape[-1]), rows, own).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def adds_in_products(x: Tensor) -> bool:
    """Whether ``linear_beside`` is more than ``linear``: on accelerators, where there is a gradient to add."""
    return torch.is_grad_enabled() and x.requires_grad and x.device.type != "cpu" and not torch.compiler.is_compiling()


def linear_beside(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``linear``, and ``x`` for whatever else reads it: one kernel less than where autograd adds both gradients up."""
    if not adds_in_products(x):
        return linear(x, weight, bias), x
    for parameter in (weight, bias):
        if parameter is not None:
            note_use(parameter, x.dtype)
    if not is_gathered_on_use(weight):
        weight, bias = working(weight, x.dtype), None if bias is None else working(bias, x.dtype)
    made: tuple[Tensor, Tensor] = _LinearBeside.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return made


class Linear(nn.Module):
    """``nn.Linear`` with fp32 parameters that follows the dtype of its input.

    Weights start from a normal distribution of standard deviation ``in_features ** -0.5`` cut at two deviations, biases
    from zero.

    Source: LeCun et al., Efficient BackProp (1998), section 4.6: outputs vary as much as inputs do.
    Differs: ViT and BERT take 0.02 at every width. At width 192 that is a quarter of this: blocks then add almost
    nothing to their input, and the contrastive embeddings of all samples become equal within 30 steps (docs/log.md).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, zero: bool = False, matrices: int = 1
    ) -> None:
        """Builds the map.

        Args:
            in_features: I.
            out_features: O.
            bias: Whether there is one.
            zero: Whether weights start from zero.
            matrices: Maps of equal size that lie one above the other in the weight, such as 3 of queries, keys and
                values; 0 where its rows are vectors of their own, such as those of a router's experts. Optimizers that
                work on whole matrices read it.
        """
        super().__init__()
        self._stacked = Stacked(matrices)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if zero:
            nn.init.zeros_(self.weight)
        else:
            deviation = in_features**-0.5
            nn.init.trunc_normal_(self.weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    def stacked(self) -> Iterator[tuple[nn.Parameter, Stacked]]:
        """How matrices lie in the weight."""
        yield self.weight, self._stacked

    def forward(self, x: Tensor, beside: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Maps ``[..., I]`` to ``[..., O]`` in ``x.dtype``; with ``beside`` returns what ``linear_beside`` does."""
        if beside:
            return linear_beside(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with fp32 parameters, output in the input's dtype."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., D]``; the result has the input's dtype.

        On the CPU bf16 goes through fp32: torch's bf16 kernel adds up the parameters' gradients in bf16, which was off
        by a quarter of their size over 2,368 positions, and was not faster (1.16 ms against 1.07 ms, D = 384).
        """
        if x.dtype != self.weight.dtype and x.device.type == "cpu":
            return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps).to(
                x.dtype
            )
        weight, bias = working(self.weight, x.dtype), working(self.bias, x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)
