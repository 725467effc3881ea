"""The products of a bank of experts, in several ways that give the same.

``loop``: one expert after the other, by autograd. The reference.
``grouped``: ``torch.nn.functional.grouped_mm``, one kernel for all experts on a GPU.
``blocked``: the loop written for a CPU, forward and backward; see below.

Shapes: E experts, D hidden size, F inner size, N rows in the experts' order, n rows of one expert.

Why the obvious ways are slow on a CPU (64 experts of 384 x 1536, 64 bf16 rows each, one core of an AMX machine):

- A product of few rows with a large matrix is spent on bringing the matrix into the kernel's layout. ``rows @ W.T``
  took 18 ms for all experts, ``rows @ W`` 14, ``W @ rows.T`` 9: a matrix on the left is read as it lies. Stored as
  ``[D, F]``, each of the two matrices is on the left once per step and never transposed on the right.
- Kernels are compiled for every number of rows and kept. Rows are filled up to one of few numbers (``padded_rows``).
- A gradient of many megabytes is memory that the system hands out anew, and clears, in every step: 27 ms where writing
  it takes 6. ``blocked`` keeps the memory of the last step for the next one where nobody holds it any more.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.gradient_memory import GradientMemory
from moe.linear import linear

Implementation = Literal["auto", "loop", "grouped", "blocked"]

_FEWEST_ROWS = 16


def expert_feed_forward(
    rows_ND: Tensor,
    tokens_per_expert_E: Tensor,
    fc1_weight_EDF: Tensor,
    fc1_bias_EF: Tensor,
    fc2_weight_EDF: Tensor,
    fc2_bias_ED: Tensor,
    *,
    implementation: Implementation = "auto",
    memory: GradientMemory | None = None,
) -> Tensor:
    """``fc2(gelu(fc1(x)))`` of each expert on its rows.

    Args:
        rows_ND: Expert by expert. Rows behind the last expert's come back as zeros or as they like.
        tokens_per_expert_E: int64.
        fc1_weight_EDF: Multiplied as ``x @ W``.
        fc1_bias_EF: Added to the product.
        fc2_weight_EDF: Multiplied as ``x @ W.T``.
        fc2_bias_ED: Added to the product.
        implementation: How; ``auto`` takes ``blocked`` on a CPU and ``grouped`` elsewhere.
        memory: Where ``blocked`` takes the memory of gradients from; None: from the system.

    Returns:
        ``[N, D]`` in the dtype of the rows.
    """
    if implementation == "auto":
        implementation = "blocked" if rows_ND.device.type == "cpu" else "grouped"
    weights = fc1_weight_EDF, fc1_bias_EF, fc2_weight_EDF, fc2_bias_ED
    if len(fc1_weight_EDF) == 1:
        return _single(rows_ND, *weights)
    if implementation == "loop":
        return _loop(rows_ND, tokens_per_expert_E, *weights)
    if implementation == "grouped":
        return _grouped(rows_ND, tokens_per_expert_E, *weights)
    assert implementation == "blocked", implementation
    memory = GradientMemory() if memory is None else memory
    out_ND: Tensor = _Blocked.apply(rows_ND, tokens_per_expert_E, *weights, memory)  # type: ignore[no-untyped-call]
    return out_ND


def _single(rows_ND: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EDF: Tensor, b2_ED: Tensor) -> Tensor:
    """One expert: a dense layer, bit for bit."""
    return linear(F.gelu(linear(rows_ND, w1_EDF[0].t(), b1_EF[0])), w2_EDF[0], b2_ED[0])


def _loop(rows_ND: Tensor, tokens_E: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EDF: Tensor, b2_ED: Tensor) -> Tensor:
    counts = tokens_E.tolist()
    parts = torch.split(rows_ND, [*counts, len(rows_ND) - sum(counts)])
    made = [
        linear(F.gelu(linear(part, w1.t(), b1)), w2, b2)
        for part, w1, b1, w2, b2 in zip(parts[:-1], w1_EDF, b1_EF, w2_EDF, b2_ED, strict=True)
    ]
    return torch.cat([*made, torch.zeros_like(parts[-1])])


def _grouped(rows_ND: Tensor, tokens_E: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EDF: Tensor, b2_ED: Tensor) -> Tensor:
    ends_E, dtype = tokens_E.cumsum(0, dtype=torch.int32), rows_ND.dtype
    expert_N = torch.searchsorted(ends_E, torch.arange(len(rows_ND), device=rows_ND.device), right=True)

    def bias(bias_E: Tensor) -> Tensor:
        # Rows of no expert hold anything, and so do their gradients: they go to a row of their own.
        return F.pad(bias_E.to(dtype), (0, 0, 0, 1))[expert_N]

    inner_NF = F.grouped_mm(rows_ND, w1_EDF.to(dtype), offs=ends_E) + bias(b1_EF)
    out_ND = F.grouped_mm(F.gelu(inner_NF), w2_EDF.to(dtype).transpose(1, 2), offs=ends_E)
    return out_ND + bias(b2_ED)


def padded_rows(rows: int) -> int:
    """``rows`` rounded up so that no more than eight numbers lie between two powers of two; at least 16."""
    step = max(_FEWEST_ROWS, 1 << max(0, (rows - 1).bit_length() - 4))
    return max(_FEWEST_ROWS, -(-rows // step) * step)


class _Blocked(torch.autograd.Function):
    """Expert by expert, each matrix in the place where the CPU is quickest with it; no gradient but in the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        tokens_E: Tensor,
        w1_EDF: Tensor,
        b1_EF: Tensor,
        w2_EDF: Tensor,
        b2_ED: Tensor,
        memory: GradientMemory,
    ) -> Tensor:
        dtype, counts = rows_ND.dtype, tokens_E.tolist()
        spans = list(_spans(counts))
        inner_PF = rows_ND.new_empty(sum(padded for _, _, padded, _ in spans), w1_EDF.shape[2])
        out_ND = rows_ND.new_zeros(rows_ND.shape)
        for expert, (first, count, padded, place) in enumerate(spans):
            if count == 0:
                continue
            inner = inner_PF[place : place + padded]
            torch.mm(_fill(rows_ND[first : first + count], padded), w1_EDF[expert].to(dtype), out=inner)
            inner += b1_EF[expert].to(dtype)
            out = w2_EDF[expert].to(dtype) @ F.gelu(inner).t()
            torch.add(out.t()[:count], b2_ED[expert].to(dtype), out=out_ND[first : first + count])
        ctx.save_for_backward(rows_ND, inner_PF, w1_EDF, b1_EF, w2_EDF, b2_ED)
        ctx.counts, ctx.memory = counts, memory
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND = grads[0]
        rows_ND, inner_PF, w1_EDF, b1_EF, w2_EDF, b2_ED = ctx.saved_tensors
        dtype = rows_ND.dtype
        grad_rows_ND = torch.zeros_like(rows_ND)
        parameters = w1_EDF, b1_EF, w2_EDF, b2_ED
        grad_w1, grad_b1, grad_w2, grad_b2 = (ctx.memory.like(place, one) for place, one in enumerate(parameters))
        for expert, (first, count, padded, place) in enumerate(_spans(ctx.counts)):
            if count == 0:
                for gradient in (grad_w1, grad_b1, grad_w2, grad_b2):
                    gradient[expert].zero_()
                continue
            span = slice(first, first + count)
            inner, grad, rows = inner_PF[place : place + padded], _fill(grad_ND[span], padded), rows_ND[span]
            grad_inner = torch.ops.aten.gelu_backward(grad @ w2_EDF[expert].to(dtype), inner)
            grad_rows_ND[span] = (w1_EDF[expert].to(dtype) @ grad_inner.t()).t()[:count]
            _into(grad_w1[expert], _fill(rows, padded).t(), grad_inner)
            grad_b1[expert] = grad_inner.sum(0)
            _into(grad_w2[expert], grad.t(), F.gelu(inner))
            grad_b2[expert] = grad.sum(0)
        return grad_rows_ND, None, grad_w1, grad_b1, grad_w2, grad_b2, None


def _into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Writes a product, without a copy where the dtypes agree."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _spans(counts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, rows with padding, place among padded rows) of each expert."""
    first = place = 0
    for count in counts:
        padded = padded_rows(count) if count else 0
        yield first, count, padded, place
        first, place = first + count, place + padded


def _fill(rows: Tensor, padded: int) -> Tensor:
    """Rows filled up with zeros."""
    return rows if len(rows) == padded else F.pad(rows, (0, 0, 0, padded - len(rows)))
