"""The feed-forward slot with sparse experts: route, dispatch, experts, combine.

Shapes: T tokens, D hidden size, F inner size, E experts, K choices per token, M modalities.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.dense import DenseFeedForward
from moe.dispatch.by_token import Routing, arrange, combine, dispatch, expert_capacity
from moe.experts.bank import ExpertBank
from moe.routers.expert_choice import ExpertChoiceRouter, Picks, arrange_picks, give, take
from moe.routers.losses import RouterSums, pick_sums, router_sums
from moe.routers.token_choice import Choice, Router, TokenChoiceRouter
from moe.slot import FeedForwardOutput
from moe.tokens import Tokens


class SparseFeedForward(nn.Module):
    """Each token goes to its experts, and their outputs are added up by the router's weights.

    A token chooses its K experts, or each expert its tokens (``routing``). In the second case what a token gets depends
    on the other tokens of the call.
    """

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
        self.router = _build_router(config, hidden_size, modalities)
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
            assert isinstance(self.router, TokenChoiceRouter)
            self.router.update_selection_bias(tokens_per_expert_E, self.config.selection_bias_rate)

    def routing(self, choice: Choice, valid_T: Tensor | None) -> Routing:
        """Which choices are served, and in which rows. It draws nothing, so that a listener finds what forward found.

        Args:
            choice: What the router said of T tokens.
            valid_T: bool; padding is not served and takes no room. None: there is none.
        """
        factor, experts = self.config.capacity_factor, self.config.num_experts
        tokens = len(choice.expert_TK)
        return arrange(
            choice.expert_TK,
            experts,
            valid_T=valid_T,
            capacity=None if factor is None else expert_capacity(tokens, experts, self.config.top_k, factor),
            priority_T=choice.gate_TK.detach().amax(-1) if self.config.priority else None,
        )

    def forward(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape; padding and what exceeds a capacity get zero from the experts."""
        x_TD = x.reshape(-1, x.shape[-1])
        modality_T = tokens.modality_ids(self.modalities, x.device)
        chooses = self._by_experts if isinstance(self.router, ExpertChoiceRouter) else self._by_tokens
        y_TD, sums = chooses(x_TD, modality_T, tokens.valid)
        y = y_TD.view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x).y
        return FeedForwardOutput(y, sums.pack())

    def _by_tokens(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None) -> tuple[Tensor, RouterSums]:
        """What the experts make of the tokens that chose them."""
        choice: Choice = self.router(x_TD, modality_T)
        routing = self.routing(choice, valid_T)
        rows_ND = self.experts(dispatch(x_TD, routing), routing.tokens_per_expert_E)
        sums = router_sums(choice, routing, modality_T, len(self.modalities), valid_T)
        return combine(rows_ND, choice.gate_TK, routing), sums

    def _by_experts(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None) -> tuple[Tensor, RouterSums]:
        """What the experts make of the tokens that they chose."""
        picks: Picks = self.router(x_TD, modality_T, valid_T)
        taken = arrange_picks(picks)
        rows_ND = self.experts(take(x_TD, taken), taken.tokens_per_expert_E)
        sums = pick_sums(picks, self.config.top_k, modality_T, len(self.modalities), valid_T)
        return give(rows_ND, picks.gate_EC, taken, len(x_TD)), sums


def _build_router(config: LIMoEConfig | MoMELIMoEConfig, hidden_size: int, modalities: Sequence[str]) -> Router:
    allowed = allowed_experts(config, modalities)
    if config.routing == "expert_choice":
        per_token = config.experts_per_token
        return ExpertChoiceRouter(hidden_size, config.num_experts, experts_per_token=per_token, allowed=allowed)
    return TokenChoiceRouter(
        hidden_size,
        config.num_experts,
        top_k=config.top_k,
        noise=config.noise,
        renormalise=config.renormalise,
        allowed=allowed,
        selection_bias=config.selection_bias_rate > 0,
    )


def allowed_experts(config: LIMoEConfig | MoMELIMoEConfig, modalities: Sequence[str]) -> list[list[bool]] | None:
    """Which experts each modality may go to, ``[M][E]``; None where all may go to all."""
    if isinstance(config, LIMoEConfig):
        return None
    owners = [name for name, size in config.pools.items() for _ in range(size)] + [None] * config.common_experts
    return [[owner is None or owner == modality for owner in owners] for modality in modalities]


def served_shares(module: nn.Module) -> dict[int, float]:
    """The share of all tokens that an expert's parameter serves, by the parameter's ``id``; others serve every token.

    Args:
        module: With sparse layers anywhere below.
    """
    return {
        id(parameter): sparse.config.experts_per_token / sparse.config.num_experts
        for sparse in module.modules()
        if isinstance(sparse, SparseFeedForward)
        for parameter in sparse.experts.parameters()
    }
