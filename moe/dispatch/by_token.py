"""From each token's choice of experts to rows in the order of the experts, and back.

    rows_ND = dispatch(x_TD, routing)          # expert by expert
    ...                                        # what the experts make of them
    y_TD = combine(rows_ND, gate_TK, routing)

Shapes: T tokens, K choices per token, N = T * K rows, E experts, D hidden size.

Nothing is read back from the device: N does not depend on what was chosen. Choices that no expert serves (padding,
tokens above capacity) have their rows after those of the last expert.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAPACITY_MULTIPLE = 4


@dataclass(frozen=True)
class Routing:
    """A one-to-one map between choices and rows.

    Attributes:
        token_N: int64, the token of each row. The rows of an expert lie end to end, experts in their order.
        place_TK: int64, the row of each choice.
        kept_TK: bool, whether an expert serves the choice; None where all are served.
        tokens_per_expert_E: int64, rows of each expert.
    """

    token_N: Tensor
    place_TK: Tensor
    kept_TK: Tensor | None
    tokens_per_expert_E: Tensor


def arrange(
    expert_TK: Tensor,
    num_experts: int,
    *,
    valid_T: Tensor | None = None,
    capacity: int | Tensor | None = None,
    priority_T: Tensor | None = None,
) -> Routing:
    """Sorts choices by expert; within an expert by the token's place, or where there is a capacity by precedence.

    Args:
        expert_TK: int64, the experts that each token chose, first choice first.
        num_experts: E.
        valid_T: bool; the others are padding and are not served. None: all are valid.
        capacity: Most tokens that an expert serves, int64 if a tensor; None for any number. All first choices come
            before all second ones, and among equals the tokens of higher priority.
        priority_T: Tokens of higher priority are served first under a capacity; None: the earlier tokens.

    Source: Riquelme et al., V-MoE, arXiv 2106.05974, section 2.1 (capacity) and algorithms 1 and 2 (precedence).
    """
    tokens, choices = expert_TK.shape
    wanted_TK = expert_TK if valid_T is None else expert_TK.where(valid_T[:, None], num_experts)
    if capacity is None:
        row_N = wanted_TK.flatten().argsort(stable=True)
        kept_TK = None if valid_T is None else valid_T[:, None].expand(tokens, choices)
        sorted_N = wanted_TK.flatten()[row_N]
    else:
        order_T = torch.arange(tokens, device=expert_TK.device)
        if priority_T is not None:
            order_T = priority_T.argsort(descending=True, stable=True)
        # Flat indexes of all first choices by precedence, then of all second ones.
        queue_N = (order_T * choices + torch.arange(choices, device=order_T.device)[:, None]).flatten()
        queued_N = wanted_TK.flatten()[queue_N]
        served_N = _rank_in_group(queued_N, num_experts) < capacity
        served_N &= queued_N < num_experts
        final_N = queued_N.where(served_N, num_experts)
        by_expert_N = final_N.argsort(stable=True)
        row_N, sorted_N = queue_N[by_expert_N], final_N[by_expert_N]
        kept_TK = torch.empty_like(served_N).index_copy_(0, queue_N, served_N).view(tokens, choices)
    place_N = torch.empty_like(row_N)
    place_N[row_N] = torch.arange(len(row_N), device=row_N.device)
    starts = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=row_N.device))
    return Routing(row_N // choices, place_N.view(tokens, choices), kept_TK, starts.diff())


def _rank_in_group(group_N: Tensor, num_groups: int) -> Tensor:
    """How many earlier elements have the same group, int64 ``[N]``."""
    order_N = group_N.argsort(stable=True)
    sorted_N = group_N[order_N]
    starts = torch.searchsorted(sorted_N, torch.arange(num_groups + 1, device=group_N.device))
    rank_N = torch.arange(len(group_N), device=group_N.device) - starts[sorted_N]
    return torch.empty_like(rank_N).index_copy_(0, order_N, rank_N)


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Tokens that an expert serves: ``ceil(T K factor / E)``, rounded up to a multiple of 4.

    Warns once per size where rounding changes the factor.

    Source: V-MoE, arXiv 2106.05974, section 2.1 and its code (rounding).
    """
    exact = math.ceil(tokens * top_k * factor / num_experts)
    rounded = -(-exact // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
    effective = rounded * num_experts / (tokens * top_k)
    if not math.isclose(effective, factor, rel_tol=0.01):
        warnings.warn(
            f"capacity of {num_experts} experts for {tokens} tokens: factor {factor:g} asked, {effective:.3g} used "
            f"(rounded up from {exact} to {rounded} tokens per expert)",
            stacklevel=2,
        )
    return rounded


def capacity_of(valid_T: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """``expert_capacity`` of the tokens that are no padding, int64 scalar: the same however much padding there is.

    It does not warn: only the device knows how many there are.
    """
    exact = (valid_T.sum().double() * top_k * factor / num_experts).ceil()
    return ((exact / CAPACITY_MULTIPLE).ceil() * CAPACITY_MULTIPLE).long()


def dispatch(x_TD: Tensor, routing: Routing) -> Tensor:
    """The rows ``[N, D]`` of all choices, expert by expert."""
    maps = routing.token_N, routing.place_TK, routing.kept_TK
    rows_ND: Tensor = _Dispatch.apply(x_TD, *maps)  # type: ignore[no-untyped-call]
    return rows_ND


def combine(rows_ND: Tensor, gate_TK: Tensor | None, routing: Routing) -> Tensor:
    """What the experts made of each token, weighted: ``[T, D]``; zero for a token that no expert serves.

    Args:
        rows_ND: In the experts' order. Rows of no expert are not read.
        gate_TK: fp32 weights; None: all 1.
        routing: As for ``dispatch``.
    """
    maps = routing.token_N, routing.place_TK, routing.kept_TK
    y_TD: Tensor = _Combine.apply(rows_ND, gate_TK, *maps)  # type: ignore[no-untyped-call]
    return y_TD


def _taken(rows_ND: Tensor, place_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """The rows of each token's choices, ``[T, K, D]``."""
    taken_TKD = rows_ND.index_select(0, place_TK.flatten()).view(*place_TK.shape, rows_ND.shape[-1])
    return taken_TKD if kept_TK is None else taken_TKD.where(kept_TK[..., None], 0)


def _summed(taken_TKD: Tensor) -> Tensor:
    return taken_TKD[:, 0] if taken_TKD.shape[1] == 1 else taken_TKD.sum(1)


class _Dispatch(torch.autograd.Function):
    """``x[token]`` whose backward pass gathers by the inverse map, so that the order of additions is fixed."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, place_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(place_TK, kept_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        place_TK, kept_TK = ctx.saved_tensors
        return _summed(_taken(grads[0], place_TK, kept_TK)), None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sum over a token's choices; backward gathers as well."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        gate_TK: Tensor | None,
        token_N: Tensor,
        place_TK: Tensor,
        kept_TK: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows_ND if gate_TK is not None else None, gate_TK, token_N, place_TK, kept_TK)
        taken_TKD = _taken(rows_ND, place_TK, kept_TK)
        return _summed(taken_TKD if gate_TK is None else taken_TKD * gate_TK[..., None].to(rows_ND.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (grad_TD,) = grads
        rows_ND, gate_TK, token_N, place_TK, kept_TK = ctx.saved_tensors
        grad_rows_ND, grad_gate_TK = grad_TD.index_select(0, token_N), None
        if kept_TK is not None or gate_TK is not None:
            weight_TK = torch.ones_like(place_TK, dtype=grad_TD.dtype) if gate_TK is None else gate_TK.to(grad_TD.dtype)
            weight_TK = weight_TK if kept_TK is None else weight_TK.where(kept_TK, 0)
            weight_N = torch.empty_like(weight_TK).view(-1)
            weight_N[place_TK.flatten()] = weight_TK.flatten()
            grad_rows_ND *= weight_N[:, None]
        if gate_TK is not None:
            taken_TKD = _taken(rows_ND, place_TK, kept_TK)
            grad_gate_TK = (taken_TKD * grad_TD[:, None]).sum(-1, dtype=torch.float32).to(gate_TK.dtype)
        return grad_rows_ND, grad_gate_TK, None, None, None
