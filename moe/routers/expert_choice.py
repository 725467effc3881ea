"""Expert-choice routing: experts choose their tokens.

Shapes: T tokens, D hidden size, E experts, C most tokens of an expert.

All experts have equally many tokens without an auxiliary loss, and a token is served by none, one or several of them.
The experts of a token depend on the other tokens of its batch:

- on later tokens of its own text, so that a causal stack cannot use this router;
- on the other samples, so that an embedding changes with the batch in which it is computed.

In training experts choose among the tokens of one micro-batch of one process.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from moe.routers.base import Allowed, LinearRouter, RouterConfig
from moe.routers.losses import RouterLossConfig
from moe.routers.routed import ByExpert


@dataclass(frozen=True)
class ExpertChoice(RouterConfig):
    """Each expert takes the same number of tokens, its best ones, so that no loss has to balance the experts.

    A token gets none, one or several experts. Which ones depends on the other tokens of its batch, so that the router
    cannot be used for text generation (``lm``).

    Attributes:
        kind: ``expert_choice``.
        experts_per_token: Mean number of experts of a token if all experts find enough tokens.
        losses: Weights of the auxiliary losses.

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368.
    """

    tokens_choose: ClassVar[bool] = False

    kind: Literal["expert_choice"] = "expert_choice"
    experts_per_token: Annotated[float, Range(above=0)] = 1.0
    losses: RouterLossConfig = field(default_factory=RouterLossConfig)

    @property
    def looks_ahead(self) -> bool:
        """An expert compares all tokens."""
        return True

    def build(self, hidden_size: int, num_experts: int, allowed: Allowed) -> "ExpertChoiceRouter":
        """The module, with fresh weights."""
        return ExpertChoiceRouter(self, hidden_size, num_experts, allowed)


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the C tokens that give it the highest probability.

    ``S = softmax(X W)`` over experts; ``G, I = topk(S^T, C)`` over tokens, ``C = n k / E`` of n tokens with k experts
    each in the mean; ``y_t = sum of G_ij FFN_i(x_t) over all i, j with I_ij = t``.

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368, section 3.2.
    Differs: padding is never taken, and n does not count it. If modalities have separate experts, an expert takes only
    tokens of allowed modalities; an expert that finds fewer than C tokens takes fewer.
    """

    def __init__(self, config: ExpertChoice, hidden_size: int, num_experts: int, allowed: Allowed = None) -> None:
        """Builds a router.

        Args:
            config: Its options.
            hidden_size: D.
            num_experts: E.
            allowed: See ``Allowed``.
        """
        super().__init__(hidden_size, num_experts, allowed)
        self.experts_per_token = config.experts_per_token

    def forward(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None = None) -> ByExpert:
        """Chooses among ``x [T, D]``; arguments as in ``Router``."""
        logits_TE = self.logits(x_TD, modality_T)
        probs_TE = logits_TE.softmax(-1)
        tokens, experts = probs_TE.shape
        ranked_TE = probs_TE.detach().where(logits_TE.isfinite(), -1.0)
        if valid_T is not None:
            ranked_TE = ranked_TE.where(valid_T[:, None], -1.0)
        room = min(tokens, math.ceil(tokens * self.experts_per_token / experts))
        best_EC, token_EC = ranked_TE.t().topk(room, dim=-1)
        served_EC = best_EC >= 0
        if valid_T is not None:  # capacity for all tokens, of which only the share of the valid ones is used
            used = (valid_T.sum(dtype=torch.float64) * self.experts_per_token / experts).ceil()
            served_EC &= torch.arange(room, device=used.device) < used
        gate_EC = probs_TE.t().gather(1, token_EC).where(served_EC, 0.0)
        return ByExpert.of(logits_TE, probs_TE, token_EC, gate_EC, served_EC)
