"""From each expert's choice of tokens to rows in the experts' order, and back.

    taken = arrange_taken(token_EC, served_EC)
    rows_ND = take(x_TD, taken)                    # expert by expert
    ...                                            # what the experts make of them
    y_TD = give(rows_ND, gate_EC, taken, T)

Shapes: T tokens, D hidden size, E experts, C most tokens of an expert, N = E * C rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Taken(NamedTuple):
    """A one-to-one map between the experts' places for tokens and rows. Unused places have the last rows.

    Attributes:
        token_EC: int64, the tokens that each expert takes; all different within an expert.
        served_EC: bool, whether the expert takes the token.
        place_EC: int64, the row.
        token_N: int64, the token of each row. The rows of an expert lie end to end, experts in their order.
        served_N: bool, whether an expert serves the row.
        tokens_per_expert_E: int64, rows of each expert.
    """

    token_EC: Tensor
    served_EC: Tensor
    place_EC: Tensor
    token_N: Tensor
    served_N: Tensor
    tokens_per_expert_E: Tensor


def arrange_taken(token_EC: Tensor, served_EC: Tensor) -> Taken:
    """Sorts the taken tokens by expert. Nothing is read back from the device, since N does not depend on the choices.

    Args:
        token_EC: int64, the tokens of each expert. No token stands twice in a row.
        served_EC: bool, whether the expert takes the token.
    """
    served_N = served_EC.flatten()
    order_N = served_N.logical_not().to(torch.uint8).argsort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return Taken(
        token_EC=token_EC,
        served_EC=served_EC,
        place_EC=place_N.view_as(token_EC),
        token_N=token_EC.flatten()[order_N],
        served_N=served_N[order_N],
        tokens_per_expert_E=served_EC.sum(1),
    )


def take(x_TD: Tensor, taken: Taken) -> Tensor:
    """The rows ``[N, D]`` of what the experts take, expert by expert."""
    rows_ND: Tensor = _Take.apply(x_TD, taken)  # type: ignore[no-untyped-call]
    return rows_ND


def give(rows_ND: Tensor, gate_EC: Tensor, taken: Taken, tokens: int) -> Tensor:
    """What the experts made of each token, weighted: ``[T, D]``; zero for a token that no expert took.

    Args:
        rows_ND: In the experts' order. Rows that no expert serves are not read.
        gate_EC: fp32 weights.
        taken: As for ``take``.
        tokens: T.
    """
    gate_N = torch.empty_like(gate_EC).flatten().index_copy(0, taken.place_EC.flatten(), gate_EC.flatten())
    y_TD: Tensor = _Give.apply(rows_ND * gate_N[:, None].to(rows_ND.dtype), taken, tokens)  # type: ignore[no-untyped-call]
    return y_TD


def _added(rows_ND: Tensor, taken: Taken, tokens: int) -> Tensor:
    """The sum of each token's rows, ``[T, D]``.

    Rows are added expert by expert, and no expert has a token twice: the order of additions is fixed on a GPU too. Sums
    are fp32.
    """
    exact = torch.promote_types(rows_ND.dtype, torch.float32)
    total_TD = torch.zeros(tokens, rows_ND.shape[1], dtype=exact, device=rows_ND.device)
    for token_C, served_C, place_C in zip(taken.token_EC, taken.served_EC, taken.place_EC, strict=True):
        own_CD = rows_ND.index_select(0, place_C).where(served_C[:, None], 0)
        total_TD.index_add_(0, token_C, own_CD.to(exact))
    return total_TD.to(rows_ND.dtype)


class _Take(torch.autograd.Function):
    """``x[token]``; ``_Give`` is its transpose."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, taken: Taken) -> Tensor:
        ctx.save_for_backward(*taken)
        ctx.tokens = len(x_TD)
        return x_TD.index_select(0, taken.token_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _added(grads[0], Taken(*ctx.saved_tensors), ctx.tokens), None


class _Give(torch.autograd.Function):
    """The sum of each token's rows; ``_Take`` is its transpose."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, taken: Taken, tokens: int) -> Tensor:
        ctx.save_for_backward(*taken)
        return _added(rows_ND, taken, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        taken = Taken(*ctx.saved_tensors)
        return grads[0].index_select(0, taken.token_N).where(taken.served_N[:, None], 0), None, None
