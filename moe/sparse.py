"""The feed-forward slot with sparse experts: route, dispatch, experts, combine.

Shapes: T tokens, D hidden size, F inner size, E experts, K choices per token, M modalities.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.dense import DenseFeedForward
from moe.experts import ExpertBank
from moe.feed_forward import FeedForwardOutput
from moe.router import TokenChoiceRouter
from moe.router_losses import RouterSums, router_sums
from moe.routing import arrange, combine, dispatch, expert_capacity
from moe.tokens import Tokens


class SparseFeedForward(nn.Module):
    """Each token goes to its K experts, and their outputs are added up by the router's weights."""

    def __init__(
        self, config: LIMoEConfig | MoMELIMoEConfig, hidden_size: int, inner_size: int, modalities: Sequence[str]
    ) -> None:
        """Builds router and experts.

        Args:
            config: Sizes and choices.
            hidden_size: D.
            inner_size: F of a dense layer; an expert's is ``expert_ratio`` times as large.
            modalities: Names of the M modalities, in the order in which statistics name them.
        """
        super().__init__()
        self.config, self.modalities = config, tuple(modalities)
        inner = round(inner_size * config.expert_ratio)
        self.router = TokenChoiceRouter(
            hidden_size,
            config.num_experts,
            top_k=config.top_k,
            noise=config.noise,
            renormalise=config.renormalise,
            allowed=allowed_experts(config, modalities),
            selection_bias=config.selection_bias_rate > 0,
        )
        self.experts = ExpertBank(config.num_experts, hidden_size, inner, implementation=config.implementation)
        shared = inner * config.shared_experts
        self.shared = DenseFeedForward(hidden_size, shared) if shared else None

    def tokens_per_expert(self, router_sums: Tensor) -> Tensor:
        """Choices that each expert served, fp32 ``[E]``, of what ``forward`` returned."""
        return RouterSums.unpack(router_sums.detach(), len(self.modalities)).chosen_ME.sum(0)

    def after_step(self, tokens_per_expert_E: Tensor) -> None:
        """Moves the selection bias, if there is one.

        Args:
            tokens_per_expert_E: Of the optimizer step, over all replicas.
        """
        if self.config.selection_bias_rate > 0:
            self.router.update_selection_bias(tokens_per_expert_E, self.config.selection_bias_rate)

    def forward(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape; padding and what exceeds a capacity get zero from the experts."""
        x_TD = x.reshape(-1, x.shape[-1])
        modality_T = tokens.modality_ids(self.modalities, x.device)
        choice = self.router(x_TD, modality_T)
        factor, experts = self.config.capacity_factor, self.config.num_experts
        routing = arrange(
            choice.expert_TK,
            experts,
            valid_T=tokens.valid,
            capacity=None if factor is None else expert_capacity(len(x_TD), experts, self.config.top_k, factor),
            priority_T=choice.gate_TK.detach().amax(-1) if self.config.priority else None,
        )
        rows_ND = self.experts(dispatch(x_TD, routing), routing.tokens_per_expert_E)
        y = combine(rows_ND, choice.gate_TK, routing).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x).y
        sums = router_sums(choice, routing, modality_T, len(self.modalities), tokens.valid)
        return FeedForwardOutput(y, sums.pack())


def allowed_experts(config: LIMoEConfig | MoMELIMoEConfig, modalities: Sequence[str]) -> list[list[bool]] | None:
    """Which experts each modality may go to, ``[M][E]``; None where all may go to all."""
    if isinstance(config, LIMoEConfig):
        return None
    owners = [name for name, size in config.pools.items() for _ in range(size)] + [None] * config.common_experts
    return [[owner is None or owner == modality for owner in owners] for modality in modalities]
