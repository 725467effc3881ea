"""The result of a router: which token goes to which expert, with what weight, and values for losses and statistics.

    routed = router(x_TD, modality_T, valid_T)
    rows_ND = routed.dispatch(x_TD)                # expert by expert
    ...                                            # what the experts make of them
    y_TD = routed.combine(rows_ND)

Shapes: T tokens, D hidden size, E experts, K choices per token, C most tokens of an expert, N rows in the order of the
experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moe.dispatch.by_expert import Taken, arrange_taken, give, take
from moe.dispatch.by_token import Routing, arrange, combine, dispatch


@dataclass(frozen=True)
class Said:
    """Outputs of a router for each token, from which losses, statistics and recordings are computed.

    Attributes:
        logits_TE: fp32, without noise, with gradient; ``-inf`` where the token may not go.
        probs_TE: fp32, the probabilities of the experts without noise, with gradient; rows add up to 1.
        served_TE: fp32, how many choices of the token the expert serves: 0 or 1.
        choices_T: fp32, how many choices the token has.
        dropped_T: fp32, how many of them no expert served.
        load_TE: fp32, the probability that the token would be sent to the expert if the noise were drawn anew, with
            gradient; None where the router draws none.
        chosen_TE: fp32, how many choices of the token name the expert, served or not: what balances experts counts
            these, since a busy expert would seem less busy by the choices that it drops. None where all are served.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    served_TE: Tensor
    choices_T: Tensor
    dropped_T: Tensor
    load_TE: Tensor | None = None
    chosen_TE: Tensor | None = None


@dataclass(frozen=True)
class Choices:
    """The experts of each token.

    Attributes:
        expert_TK: int64, highest weight first; -1 where the token has no further expert.
        gate_TK: fp32, their weights; 0 beside -1.
        served_TK: bool, whether the expert serves the token: False above its capacity, for padding, and beside -1.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    served_TK: Tensor


class Routed(ABC):
    """The routing of the tokens of one call.

    A router returns ``ByToken`` or ``ByExpert``, or another subclass that moves rows in another way.

    Attributes:
        said: The router's outputs for the tokens.
    """

    said: Said

    @property
    @abstractmethod
    def tokens_per_expert(self) -> Tensor:
        """int64, rows of each expert."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor) -> Tensor:
        """The rows ``[N, D]`` of the tokens, expert by expert; rows of no expert come after those of the last one."""

    @abstractmethod
    def combine(self, rows_ND: Tensor) -> Tensor:
        """What the experts made of each token, weighted: ``[T, D]``; zero for a token that no expert serves.

        Args:
            rows_ND: In the order of ``dispatch``. Rows of no expert are not read.
        """

    @abstractmethod
    def choices(self) -> Choices:
        """The experts of each token. It may read back from the device: only analysis calls it."""


@dataclass(frozen=True)
class ByToken(Routed):
    """Every token has its K experts.

    Attributes:
        said: See ``Routed``.
        routing: The row of each choice.
        expert_TK: int64, the chosen experts, best first.
        gate_TK: fp32, their weights, with gradient.
    """

    said: Said
    routing: Routing
    expert_TK: Tensor
    gate_TK: Tensor

    @classmethod
    def of(
        cls,
        logits_TE: Tensor,
        probs_TE: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        *,
        valid_T: Tensor | None = None,
        capacity: int | Tensor | None = None,
        priority_T: Tensor | None = None,
        load_TE: Tensor | None = None,
    ) -> Self:
        """Sends tokens to the experts that were chosen for them.

        Args:
            logits_TE: As in ``Said``.
            probs_TE: As in ``Said``.
            expert_TK: int64, the chosen experts, best first.
            gate_TK: fp32, their weights, with gradient.
            valid_T: bool; padding is not served and does not count against the capacity. None: there is none.
            capacity: Most tokens that an expert serves; None for any number.
            priority_T: Tokens of higher priority are served first under a capacity; None: the earlier tokens.
            load_TE: As in ``Said``.
        """
        experts = logits_TE.shape[1]
        routing = arrange(expert_TK, experts, valid_T=valid_T, capacity=capacity, priority_T=priority_T)
        served_TK = torch.ones_like(gate_TK)
        if routing.kept_TK is not None:
            served_TK = served_TK * routing.kept_TK
        experts_E = torch.arange(experts, device=expert_TK.device)
        named_TKE = expert_TK[..., None] == experts_E
        served_TE, chosen_TE = (named_TKE * served_TK[..., None]).sum(1), named_TKE.sum(1).to(served_TK.dtype)
        dropped_T = (1.0 - served_TK).sum(-1)
        choices_T = torch.full_like(dropped_T, expert_TK.shape[1])
        said = Said(logits_TE, probs_TE, served_TE, choices_T, dropped_T, load_TE, chosen_TE)
        return cls(said, routing, expert_TK, gate_TK)

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64, rows of each expert."""
        return self.routing.tokens_per_expert_E

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """One gather, and one in the backward pass."""
        return dispatch(x_TD, self.routing)

    def combine(self, rows_ND: Tensor) -> Tensor:
        """One gather, and one in the backward pass."""
        return combine(rows_ND, self.gate_TK, self.routing)

    def choices(self) -> Choices:
        """The choices of the tokens, and which of them were served."""
        kept_TK = self.routing.kept_TK
        served_TK = torch.ones_like(self.expert_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        return Choices(self.expert_TK, self.gate_TK.detach(), served_TK)


@dataclass(frozen=True)
class ByExpert(Routed):
    """Every expert has its C tokens. A token has none, one or several experts, and counts as one choice.

    Attributes:
        said: See ``Routed``.
        taken: The row of each token that an expert takes.
        gate_EC: fp32, the weights of the tokens, with gradient; 0 where the expert takes none.
    """

    said: Said
    taken: Taken
    gate_EC: Tensor

    @classmethod
    def of(
        cls,
        logits_TE: Tensor,
        probs_TE: Tensor,
        token_EC: Tensor,
        gate_EC: Tensor,
        served_EC: Tensor,
    ) -> Self:
        """Sends experts the tokens that were chosen for them.

        Args:
            logits_TE: As in ``Said``.
            probs_TE: As in ``Said``.
            token_EC: int64, the tokens of each expert, best first. No token stands twice in a row.
            gate_EC: fp32, their weights, with gradient; 0 where ``served_EC`` is false.
            served_EC: bool, whether the expert takes the token; padding is taken by none.
        """
        one_EC = served_EC.to(probs_TE.dtype)
        served_TE = torch.zeros_like(probs_TE.t()).scatter_(1, token_EC, one_EC).t()
        dropped_T = (served_TE.sum(-1) == 0).to(served_TE.dtype)
        said = Said(logits_TE, probs_TE, served_TE, torch.ones_like(dropped_T), dropped_T)
        return cls(said, arrange_taken(token_EC, served_EC), gate_EC)

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64, rows of each expert."""
        return self.taken.tokens_per_expert_E

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """One gather; the backward pass adds up a token's rows expert by expert."""
        return take(x_TD, self.taken)

    def combine(self, rows_ND: Tensor) -> Tensor:
        """Adds up a token's rows expert by expert; one gather in the backward pass."""
        return give(rows_ND, self.gate_EC, self.taken, len(self.said.probs_TE))

    def choices(self) -> Choices:
        """The experts that took each token. K is the largest number of experts of a token, at least 1."""
        token_EC, served_EC = self.taken.token_EC, self.taken.served_EC
        weight_ET = self.gate_EC.new_full((len(token_EC), len(self.said.probs_TE)), -1.0)
        weight_ET.scatter_(1, token_EC, self.gate_EC.detach().where(served_EC, -1.0))
        most = max(1, int((weight_ET >= 0).sum(0).max()))
        weight_TK, expert_TK = weight_ET.t().topk(most, dim=-1)
        served_TK = weight_TK >= 0
        return Choices(expert_TK.where(served_TK, -1), weight_TK.clamp_min(0.0), served_TK)
