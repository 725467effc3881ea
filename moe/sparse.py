"""The feed-forward slot with sparse experts: route, dispatch, experts, combine.

Shapes: T tokens, D hidden size, F inner size, E experts, M modalities.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.dense import DenseFeedForward
from moe.experts.bank import ExpertBank
from moe.routers.base import Router
from moe.routers.routed import Routed
from moe.routers.sums import RouterSums
from moe.slot import FeedForwardOutput
from moe.tokens import Tokens


class SparseFeedForward(nn.Module):
    """Each token goes to some of the experts, and their outputs are added up by the router's weights.

    The router decides which. The outputs of shared experts are added to all tokens.
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
        allowed = config.allowed_experts(modalities)
        self.router: Router = config.router.build(hidden_size, config.num_experts, allowed)
        self.experts = ExpertBank(config.num_experts, hidden_size, inner, implementation=config.implementation)
        shared = inner * config.shared_experts
        self.shared = DenseFeedForward(hidden_size, shared) if shared else None

    def tokens_per_expert(self, router_sums: Tensor) -> Tensor:
        """Number of choices of each expert, served or dropped, fp32 ``[E]``, from the result of ``forward``."""
        return RouterSums.unpack(router_sums.detach(), len(self.modalities)).chosen_ME.sum(0)

    def after_step(self, tokens_per_expert_E: Tensor) -> None:
        """Lets the router balance its experts.

        Args:
            tokens_per_expert_E: Of the optimizer step, over all replicas.
        """
        self.router.after_step(tokens_per_expert_E)

    def forward(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape; a token that no expert serves gets zero from the routed experts."""
        x_TD = x.reshape(-1, x.shape[-1])
        modality_T = tokens.modality_ids(self.modalities, x.device)
        routed: Routed = self.router(x_TD, modality_T, tokens.valid)
        shared: list[Tensor] = []

        def run_shared() -> None:
            if self.shared is not None:
                shared.append(self.shared(x).y)

        rows_ND = self.experts(routed.dispatch(x_TD), routed.tokens_per_expert, run_shared)
        sums = RouterSums.of(routed.said, modality_T, len(self.modalities), tokens.valid)
        y = routed.combine(rows_ND).view(x.shape)
        return FeedForwardOutput(y + shared[0] if shared else y, sums.pack())


def served_shares(module: nn.Module) -> dict[int, float]:
    """The share of all tokens that use an expert's parameter, by the parameter's ``id``; all tokens use the others.

    Args:
        module: With sparse layers anywhere below.
    """
    return {
        id(parameter): sparse.config.router.experts_per_token / sparse.config.num_experts
        for sparse in module.modules()
        if isinstance(sparse, SparseFeedForward)
        for parameter in sparse.experts.parameters()
    }
