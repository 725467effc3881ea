"""The products of a bank of experts, implemented in several ways that give the same result.

``loop``: one expert after the other, by autograd. The reference.
``grouped``: ``torch.nn.functional.grouped_mm``, one kernel for all experts; for GPUs.
``batched``: batched products over experts, forward and backward; for CPUs (``_Batched``).
``megablocks``: as ``grouped``, by the kernel of that package (``moe.experts.megablocks``).

Shapes: E experts, D hidden size, F inner size, N rows in the experts' order.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from moe.experts.gradient_memory import GradientMemory
from moe.experts.levels import plan_levels
from moe.experts.megablocks import Product, megablocks_product
from moe.linear import linear
from moe.working import is_gathered_on_use, note_use, working

Implementation = Literal["auto", "loop", "grouped", "batched", "megablocks"]

_ROWS_OF_ONES, _ALIGNMENT = 16, 8  # grouped products need rows that begin at multiples of 16 bytes


def expert_feed_forward(
    rows_ND: Tensor,
    tokens_per_expert_E: Tensor,
    fc1_weight_EFD: Tensor,
    fc1_bias_EF: Tensor,
    fc2_weight_EFD: Tensor,
    fc2_bias_ED: Tensor,
    *,
    implementation: Implementation = "auto",
    memory: GradientMemory | None = None,
) -> Tensor:
    """``fc2(gelu(fc1(x)))`` of each expert on its rows.

    Args:
        rows_ND: Expert by expert. Rows after those of the last expert belong to no expert; their results are undefined.
        tokens_per_expert_E: int64.
        fc1_weight_EFD: Multiplied as ``x @ W.T``.
        fc1_bias_EF: Added to the product.
        fc2_weight_EFD: Multiplied as ``x @ W``.
        fc2_bias_ED: Added to the product.
        implementation: How; ``auto`` takes ``batched`` on a CPU and ``grouped`` elsewhere.
        memory: Provides the memory of gradients for ``batched``; None: newly allocated.

    Returns:
        ``[N, D]`` in the dtype of the rows.
    """
    if implementation == "auto":
        implementation = "batched" if rows_ND.device.type == "cpu" else "grouped"
    weights = fc1_weight_EFD, fc1_bias_EF, fc2_weight_EFD, fc2_bias_ED
    for weight in weights:
        note_use(weight, rows_ND.dtype)
    if len(fc1_weight_EFD) == 1:
        return perceptron(rows_ND, *(weight[0] for weight in weights))
    if implementation == "loop":
        return _loop(rows_ND, tokens_per_expert_E, *weights)
    if implementation == "grouped":
        return _grouped(rows_ND, tokens_per_expert_E, *weights)
    if implementation == "megablocks":
        return _by_autograd(rows_ND, tokens_per_expert_E, *weights, megablocks_product(tokens_per_expert_E))
    out_ND: Tensor = _batched(rows_ND, tokens_per_expert_E, *weights, GradientMemory() if memory is None else memory)
    return out_ND


def perceptron(x: Tensor, w1_FD: Tensor, b1_F: Tensor, w2_FD: Tensor, b2_D: Tensor) -> Tensor:
    """One expert, ``fc2(gelu(fc1(x)))``: a dense layer, bit for bit."""
    return linear(F.gelu(linear(x, w1_FD, b1_F)), w2_FD.t(), b2_D)


def _loop(rows_ND: Tensor, tokens_E: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor) -> Tensor:
    counts = tokens_E.tolist()
    parts = torch.split(rows_ND, [*counts, len(rows_ND) - sum(counts)])
    made = [perceptron(*own) for own in zip(parts[:-1], w1_EFD, b1_EF, w2_EFD, b2_ED, strict=True)]
    return torch.cat([*made, torch.zeros_like(parts[-1])])


def _by_autograd(
    rows_ND: Tensor,
    tokens_E: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor,
    w2_EFD: Tensor,
    b2_ED: Tensor,
    product: Product,
) -> Tensor:
    """By a product that has its own gradient."""
    ends_E, dtype = tokens_E.cumsum(0, dtype=torch.int32), rows_ND.dtype
    inner_NF = product(rows_ND, working(w1_EFD, dtype), True)
    inner_NF = _AddBias.apply(inner_NF, working(b1_EF, dtype), ends_E)  # type: ignore[no-untyped-call]
    out_ND = product(F.gelu(inner_NF), working(w2_EFD, dtype), False)
    added_ND: Tensor = _AddBias.apply(out_ND, working(b2_ED, dtype), ends_E)  # type: ignore[no-untyped-call]
    return added_ND


class _AddBias(torch.autograd.Function):
    """Adds each expert's bias to its rows."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, bias_EC: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.bias_dtype = bias_EC.dtype
        return x_NC + _of_rows(bias_EC.to(x_NC.dtype), _experts(x_NC, ends_E))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_NC,) = grads
        return grad_NC, _sums(grad_NC, *ctx.saved_tensors).to(ctx.bias_dtype), None


def _experts(rows_NC: Tensor, ends_E: Tensor) -> Tensor:
    """int64 ``[N]``: the expert of each row, the last one for rows of none."""
    places_N = torch.arange(len(rows_NC), device=rows_NC.device)
    return torch.searchsorted(ends_E, places_N, right=True).clamp_max(len(ends_E) - 1)


def _of_rows(values_EC: Tensor, expert_N: Tensor) -> Tensor:
    return values_EC.index_select(0, expert_N)


def _sums(rows_NC: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of each expert's rows, by a product: in order, in fp32, own rows only."""
    ones = rows_NC.new_ones(_ROWS_OF_ONES, -(-len(rows_NC) // _ALIGNMENT) * _ALIGNMENT)[:, : len(rows_NC)]
    return F.grouped_mm(ones, rows_NC, offs=ends_E)[:, 0]


def _grouped(rows_ND: Tensor, tokens_E: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor) -> Tensor:
    ends_E, weights = tokens_E.cumsum(0, dtype=torch.int32), (w1_EFD, b1_EF, w2_EFD, b2_ED)
    # Weights that a host gathers on use are cast again in the backward pass: a kept cast would stay in memory.
    cast = [one if is_gathered_on_use(one) else working(one, rows_ND.dtype) for one in weights]
    out_ND: Tensor = _Grouped.apply(rows_ND, ends_E, *cast)  # type: ignore[no-untyped-call]
    return out_ND


class _Grouped(torch.autograd.Function):
    """Grouped products, of which only what enters GELU is kept: its result is computed again in the backward pass.

    A routed layer keeps the rows, in the experts' order, and what the experts return, beside what a dense layer keeps.
    Without the results of GELU it keeps less than a dense layer.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, ends_E: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor
    ) -> Tensor:
        dtype, expert_N = rows_ND.dtype, _experts(rows_ND, ends_E)
        inner_NF = F.grouped_mm(rows_ND, w1_EFD.to(dtype).transpose(1, 2), offs=ends_E)
        inner_NF += _of_rows(b1_EF.to(dtype), expert_N)
        out_ND = F.grouped_mm(F.gelu(inner_NF), w2_EFD.to(dtype), offs=ends_E)
        out_ND += _of_rows(b2_ED.to(dtype), expert_N)
        ctx.save_for_backward(rows_ND, inner_NF, ends_E, w1_EFD, w2_EFD)
        ctx.dtypes = [one.dtype for one in (w1_EFD, b1_EF, w2_EFD, b2_ED)]
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = grads
        rows_ND, inner_NF, ends_E, w1_EFD, w2_EFD = ctx.saved_tensors
        dtype, (first, first_bias, second, second_bias) = grad_ND.dtype, ctx.dtypes
        wants_rows, _, wants_first, wants_first_bias, wants_second, wants_second_bias = ctx.needs_input_grad
        made: list[Tensor | None] = [None] * 6
        if wants_second_bias:
            made[5] = _sums(grad_ND, ends_E).to(second_bias)
        if wants_second:
            made[4] = F.grouped_mm(F.gelu(inner_NF).t(), grad_ND, offs=ends_E).to(second)
        grad_inner_NF = F.grouped_mm(grad_ND, w2_EFD.to(dtype).transpose(1, 2), offs=ends_E)
        grad_inner_NF = torch.ops.aten.gelu_backward(grad_inner_NF, inner_NF)
        if wants_first_bias:
            made[3] = _sums(grad_inner_NF, ends_E).to(first_bias)
        if wants_first:
            made[2] = F.grouped_mm(grad_inner_NF.t(), rows_ND, offs=ends_E).to(first)
        if wants_rows:
            made[0] = F.grouped_mm(grad_inner_NF, w1_EFD.to(dtype), offs=ends_E)
        return tuple(made)


@_disable_dynamo  # as torch.compiler.disable does, which would import the compiler with this module: 1.4 s of CPU
def _batched(*inputs: Any) -> Tensor:
    """``_Batched``, whose shapes depend on the routing, so that a compiler would follow each of them."""
    out_ND: Tensor = _Batched.apply(*inputs)  # type: ignore[no-untyped-call]
    return out_ND


class _Batched(torch.autograd.Function):
    """Batched products over experts whose rows are padded to an equal number.

    This is the fastest form on a CPU for many experts with few rows (measured with 64 experts of 384 x 1536, 64 bf16
    rows each, two cores with AMX; time in ms of the product of all experts):

    - One call for all experts: each thread then computes whole experts instead of a part of each. ``rows @ W.T`` 4.8
      batched, 6.8 one after the other.
    - The matrix on the left and not transposed: ``W @ rows.T`` 2.5. A matrix on the right, or a transposed one on the
      left, is first copied into the kernel's memory layout, which for few rows is most of the work. Both matrices are
      therefore stored inner by hidden and the inner activations inner by rows. Of the six products of a step, two are
      of the form ``W @ rows.T`` (2.6), two give gradients as ``inner @ rows`` (3.4) and two are ``inner.T @ W`` (5.3);
      the plain forms take 4.8, 6.7 and 4.1 to 5.7.
    - Few different numbers of rows, because a kernel is compiled and kept for every shape (``plan_levels``).
    - The memory of the last step's gradients is reused (``GradientMemory``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        tokens_E: Tensor,
        w1_EFD: Tensor,
        b1_EF: Tensor,
        w2_EFD: Tensor,
        b2_ED: Tensor,
        memory: GradientMemory,
    ) -> Tensor:
        levels, dtype = plan_levels(tokens_E.tolist(), len(rows_ND)), rows_ND.dtype
        out_ND = torch.empty_like(rows_ND) if levels else torch.zeros_like(rows_ND)
        kept: list[Tensor] = []
        for level in levels:
            w1, b1, w2, b2 = (level.of(one).to(dtype) for one in (w1_EFD, b1_EF, w2_EFD, b2_ED))
            x_EPD = level.fill(rows_ND, zeros=False)  # gradients of empty rows are zero, and with them their products
            inner_EFP = torch.bmm(w1, x_EPD.transpose(1, 2)).add_(b1[..., None])
            activated_EFP = F.gelu(inner_EFP)
            level.put(out_ND, torch.bmm(activated_EFP.transpose(1, 2), w2).add_(b2[:, None]))
            kept += [x_EPD, inner_EFP, activated_EFP]
        ctx.save_for_backward(w1_EFD, b1_EF, w2_EFD, b2_ED, *kept)
        ctx.levels, ctx.memory = levels, memory
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = grads
        w1_EFD, b1_EF, w2_EFD, b2_ED, *kept = ctx.saved_tensors
        dtype, levels = grad_ND.dtype, ctx.levels
        grad_rows_ND = torch.empty_like(grad_ND) if levels else torch.zeros_like(grad_ND)
        trains = any(ctx.needs_input_grad[2:6])  # frozen experts pass gradients on and need none
        parameters = (w1_EFD, b1_EF, w2_EFD, b2_ED) if trains else ()
        gradients = [ctx.memory.like(place, one) for place, one in enumerate(parameters)]
        if not levels:
            for gradient in gradients:
                gradient.zero_()
        for number, level in enumerate(levels):
            x_EPD, inner_EFP, activated_EFP = kept[3 * number : 3 * number + 3]
            grad_EPD = level.fill(grad_ND, zeros=True)
            w1, w2 = level.of(w1_EFD).to(dtype), level.of(w2_EFD).to(dtype)
            grad_inner_EFP = torch.ops.aten.gelu_backward(torch.bmm(w2, grad_EPD.transpose(1, 2)), inner_EFP)
            level.put(grad_rows_ND, torch.bmm(grad_inner_EFP.transpose(1, 2), w1))
            if not trains:
                continue
            level.give(gradients[0], grad_inner_EFP, x_EPD)
            level.give(gradients[2], activated_EFP, grad_EPD)
            level.add(gradients[1], grad_inner_EFP.sum(-1))
            level.add(gradients[3], grad_EPD.sum(1))
        return grad_rows_ND, None, *(gradients if trains else (None,) * 4), None
