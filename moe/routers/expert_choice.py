"""Experts that choose their tokens, instead of tokens that choose their experts.

    picks = router(x_TD, modality_T, valid_T)
    taken = arrange_picks(picks)
    rows_ND = take(x_TD, taken)                    # expert by expert
    ...                                            # what the experts make of them
    y_TD = give(rows_ND, picks.gate_EC, taken, T)

Shapes: T tokens, D hidden size, E experts, C most tokens of an expert, N = E * C rows, M modalities.

All experts are equally busy without an auxiliary loss, and a token is served by none, one or several of them. What a
token gets depends on the other tokens of its batch: on those behind it in its own text too, so that no causal stack may
be built of it, and on the other samples, so that an embedding changes with the batch in which it is computed. In
training experts choose among the tokens of one micro-batch of one process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.routers.token_choice import Router


@dataclass(frozen=True)
class Picks:
    """What the experts say of all tokens.

    Attributes:
        logits_TE: fp32; ``-inf`` where the token may not go.
        probs_TE: fp32, the softmax of the logits over experts.
        token_EC: int64, the tokens of each expert, best first. No token stands twice in a row.
        gate_EC: fp32, their weights, with gradient; 0 where ``served_EC`` is false.
        served_EC: bool, whether the expert takes the token; False where it finds no more of them.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    token_EC: Tensor
    gate_EC: Tensor
    served_EC: Tensor

    def served(self) -> Tensor:
        """Which expert takes which token, ``[T, E]`` of 0 and 1."""
        served_EC = self.served_EC.to(self.probs_TE.dtype)
        return torch.zeros_like(self.probs_TE.t()).scatter_(1, self.token_EC, served_EC).t()

    def by_token(self) -> tuple[Tensor, Tensor]:
        """The experts int64 ``[T, K]`` of each token, highest weight first, and their weights fp32.

        K is the largest number of experts of a token, at least 1; -1 and 0 stand where a token has fewer.
        """
        experts = len(self.token_EC)
        weight_ET = self.gate_EC.new_full((experts, len(self.probs_TE)), -1.0)
        weight_ET.scatter_(1, self.token_EC, self.gate_EC.detach().where(self.served_EC, -1.0))
        most = max(1, int((weight_ET >= 0).sum(0).max()))
        weight_TK, expert_TK = weight_ET.t().topk(most, dim=-1)
        return expert_TK.where(weight_TK >= 0, -1), weight_TK.clamp_min(0.0)


class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens that give it the highest probability.

    ``S = softmax(X W)`` over experts; ``G, I = topk(S^T, C)`` over tokens, ``C = n k / E`` of n tokens with k experts
    each in the mean; ``y_t = sum of G_ij FFN_i(x_t) over all i, j with I_ij = t``.

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368, section 3.2.
    Differs: padding is no token: it is never taken, and n does not count it. Where modalities have experts of their
        own, an expert takes only tokens that may go to it; one that finds fewer than C leaves the rest of its room.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        experts_per_token: float = 1.0,
        allowed: Sequence[Sequence[bool]] | None = None,
    ) -> None:
        """Builds a router.

        Args:
            hidden_size: D.
            num_experts: E.
            experts_per_token: k, the mean number of experts per token where all find enough tokens.
            allowed: Which experts each modality may go to, ``[M][E]``; None: all may go to all.
        """
        super().__init__(hidden_size, num_experts, allowed)
        self.experts_per_token = experts_per_token

    def forward(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None = None) -> Picks:
        """Chooses among ``x [T, D]``.

        Args:
            x_TD: Tokens.
            modality_T: int64, read only where modalities have experts of their own.
            valid_T: bool; the others are padding. None: all are tokens.
        """
        logits_TE = self.logits(x_TD, modality_T)
        probs_TE = logits_TE.softmax(-1)
        tokens, experts = probs_TE.shape
        ranked_TE = probs_TE.detach().where(logits_TE.isfinite(), -1.0)
        if valid_T is not None:
            ranked_TE = ranked_TE.where(valid_T[:, None], -1.0)
        room = min(tokens, math.ceil(tokens * self.experts_per_token / experts))
        best_EC, token_EC = ranked_TE.t().topk(room, dim=-1)
        served_EC = best_EC >= 0
        if valid_T is not None:  # room for all tokens, of which only the share of the valid ones is used
            used = (valid_T.sum(dtype=torch.float64) * self.experts_per_token / experts).ceil()
            served_EC &= torch.arange(room, device=used.device) < used
        gate_EC = probs_TE.t().gather(1, token_EC).where(served_EC, 0.0)
        return Picks(logits_TE, probs_TE, token_EC, gate_EC, served_EC)


class Taken(NamedTuple):
    """A one-to-one map between the experts' room and rows. Room that is not used has its rows behind those of all.

    Attributes:
        token_EC: int64, the token that each expert takes; different ones of an expert.
        served_EC: bool, whether it does.
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


def arrange_picks(picks: Picks) -> Taken:
    """Sorts what the experts take by expert. Nothing is read back from the device: N does not depend on it."""
    served_N = picks.served_EC.flatten()
    order_N = served_N.logical_not().to(torch.uint8).argsort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return Taken(
        token_EC=picks.token_EC,
        served_EC=picks.served_EC,
        place_EC=place_N.view_as(picks.token_EC),
        token_N=picks.token_EC.flatten()[order_N],
        served_N=served_N[order_N],
        tokens_per_expert_E=picks.served_EC.sum(1),
    )


def take(x_TD: Tensor, taken: Taken) -> Tensor:
    """The rows ``[N, D]`` of what the experts take, expert by expert."""
    rows_ND: Tensor = _Take.apply(x_TD, taken)  # type: ignore[no-untyped-call]
    return rows_ND


def give(rows_ND: Tensor, gate_EC: Tensor, taken: Taken, tokens: int) -> Tensor:
    """What the experts made of each token, weighted: ``[T, D]``; zero for a token that no expert took.

    Args:
        rows_ND: In the experts' order. What stands in rows that no expert serves is not read.
        gate_EC: fp32 weights.
        taken: As for ``take``.
        tokens: T.
    """
    gate_N = torch.empty_like(gate_EC).flatten().index_copy(0, taken.place_EC.flatten(), gate_EC.flatten())
    y_TD: Tensor = _Give.apply(rows_ND * gate_N[:, None].to(rows_ND.dtype), taken, tokens)  # type: ignore[no-untyped-call]
    return y_TD


def _added(rows_ND: Tensor, taken: Taken, tokens: int) -> Tensor:
    """The sum of each token's rows, ``[T, D]``.

    Expert by expert, none of which has a token twice: the order of additions is fixed on a GPU too. Added up in fp32.
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
