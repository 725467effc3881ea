"""Token-choice routing: tokens choose their experts.

Shapes: T tokens, D hidden size, E experts, K choices per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from moe.dispatch.by_token import capacity_of, expert_capacity
from moe.ranges import Range
from moe.routers.base import Allowed, LinearRouter, RouterConfig, require
from moe.routers.losses import RouterLossConfig, Weight
from moe.routers.routed import ByToken


@dataclass(frozen=True)
class NoisyRouterLossConfig(RouterLossConfig):
    """Weights of the auxiliary losses of a router that draws noise.

    Attributes:
        load: Spread of the expected number of tokens per expert under the router's noise, ``(std / mean)^2``; needs
            noise.
    """

    spreads: ClassVar[Mapping[str, str]] = {"importance": "probs_ME", "load": "load_ME"}

    load: Weight = 0.005


@dataclass(frozen=True)
class TokenChoice(RouterConfig):
    """Each token goes to the K experts of highest probability.

    Attributes:
        kind: ``token_choice``.
        top_k: Experts per token.
        noise: Standard deviation of the noise that is added to the logits in training, in units of 1 / number of
            experts.
        renormalise: Divide a token's weights by their sum. Experts that are copies of a dense layer then equal that
            layer, as upcycling needs.
        capacity_factor: Largest number of tokens that an expert serves, over the mean number of real tokens per expert
            (padding is not counted), rounded up to a multiple of 4 tokens; null: no limit.
        priority: Under a capacity, serve tokens with a larger highest probability (before ``renormalise``) first,
            instead of earlier tokens.
        selection_bias_rate: Step of a bias that balances the experts without a loss; 0 for no bias.
        losses: Weights of the auxiliary losses.

    Source: Riquelme et al., V-MoE, arXiv 2106.05974.
    """

    kind: Literal["token_choice"] = "token_choice"
    top_k: Annotated[int, Range(1)] = 1
    noise: Annotated[float, Range(0)] = 1.0
    renormalise: bool = False
    capacity_factor: Annotated[float, Range(above=0)] | None = None
    priority: bool = True
    selection_bias_rate: Annotated[float, Range(0)] = 0.0
    losses: NoisyRouterLossConfig = field(default_factory=NoisyRouterLossConfig)

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: One contradicts another.
        """
        require(
            not (self.losses.load > 0 and self.noise == 0),
            f"router.losses: got load {self.losses.load} with noise 0, allowed is load 0, or noise above 0: the load "
            "loss is made of the noise",
        )

    @property
    def experts_per_token(self) -> float:
        """K."""
        return self.top_k

    @property
    def fewest_experts(self) -> int:
        """K."""
        return self.top_k

    @property
    def looks_ahead(self) -> bool:
        """Under a capacity a later token can take an earlier one's place: by priority, or by a higher choice."""
        return self.capacity_factor is not None and (self.priority or self.top_k > 1)

    def build(self, hidden_size: int, num_experts: int, allowed: Allowed) -> "TokenChoiceRouter":
        """The module, with fresh weights."""
        return TokenChoiceRouter(self, hidden_size, num_experts, allowed)

    def without_noise(self) -> Self:
        """The same options without noise, and without the loss that needs it."""
        return replace(self, noise=0.0, losses=replace(self.losses, load=0.0))


class TokenChoiceRouter(LinearRouter):
    """Each token goes to the K experts of highest probability.

    ``p = softmax(x W + noise)``, gates are the K largest entries of ``p``.

    Source: Riquelme et al., V-MoE, arXiv 2106.05974, eq. 1 and section 2.1: no bias, noise of deviation 1 / E in
        training. Renormalised gates: Shazeer et al., arXiv 1701.06538, eq. 3. Selection bias: Wang et al.,
        arXiv 2408.15664, section 3.
    """

    bias_E: Tensor | None

    def __init__(self, config: TokenChoice, hidden_size: int, num_experts: int, allowed: Allowed = None) -> None:
        """Builds a router.

        Args:
            config: Its options. With ``renormalise`` and one choice every gate is 1; the sum is treated as a constant,
                so that the router gets the gradient of the probability's logarithm.
            hidden_size: D.
            num_experts: E.
            allowed: See ``Allowed``.
        """
        super().__init__(hidden_size, num_experts, allowed)
        self.config, self.num_experts = config, num_experts
        self.noise = config.noise / num_experts
        self.register_buffer("bias_E", torch.zeros(num_experts) if config.selection_bias_rate > 0 else None)

    @property
    def balances(self) -> bool:
        """Whether there is a selection bias."""
        return self.bias_E is not None

    def forward(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None = None) -> ByToken:
        """Chooses for ``x [T, D]``; arguments as in ``Router``."""
        top_k = self.config.top_k
        logits_TE = self.logits(x_TD, modality_T)
        noise = self.noise if self.training else 0.0
        noisy_TE = logits_TE + noise * torch.randn_like(logits_TE) if noise > 0 else logits_TE
        probs_TE = noisy_TE.softmax(-1)
        ranked_TE = probs_TE if self.bias_E is None else probs_TE + self.bias_E.where(probs_TE > 0, -torch.inf)
        expert_TK = ranked_TE.topk(top_k, dim=-1).indices
        gate_TK = probs_TE.gather(1, expert_TK)
        surest_T = gate_TK.detach().amax(-1)  # before the next lines make one choice's weight 1
        if self.config.renormalise:
            total_T1 = gate_TK.sum(-1, keepdim=True)
            gate_TK = gate_TK / (total_T1.detach() if top_k == 1 else total_T1)
        clean_TE = logits_TE.softmax(-1) if noise > 0 else probs_TE
        return ByToken.of(
            logits_TE,
            clean_TE,
            expert_TK,
            gate_TK,
            valid_T=valid_T,
            capacity=self._capacity(len(x_TD), valid_T),
            priority_T=surest_T if self.config.priority else None,
            load_TE=expected_load(logits_TE, noisy_TE, expert_TK, noise) if noise > 0 else None,
        )

    def _capacity(self, tokens: int, valid_T: Tensor | None) -> int | Tensor | None:
        """Most tokens of an expert; None for any number."""
        factor = self.config.capacity_factor
        if factor is None:
            return None
        if valid_T is not None:
            return capacity_of(valid_T, self.num_experts, self.config.top_k, factor)
        return expert_capacity(tokens, self.num_experts, self.config.top_k, factor)

    @torch.no_grad()
    def after_step(self, tokens_per_expert_E: Tensor) -> None:
        """Raises the bias of experts that were chosen less often than the mean and lowers that of the others.

        Args:
            tokens_per_expert_E: Choices of each expert in the step, served or dropped, over all replicas.

        Source: Wang et al., arXiv 2408.15664, algorithm 1: ``b += u * sign(mean load - load)``, the load as the router
            assigns it, without a capacity.
        """
        if self.bias_E is not None:
            load_E = tokens_per_expert_E.float()
            self.bias_E += self.config.selection_bias_rate * (load_E.mean() - load_E).sign()


def expected_load(logits_TE: Tensor, noisy_TE: Tensor, expert_TK: Tensor, noise: float) -> Tensor:
    """``p_ie``: the probability that a token's logit reaches the K-th largest one if its noise is drawn anew.

    Args:
        logits_TE: Without noise.
        noisy_TE: With it.
        expert_TK: The chosen experts.
        noise: Standard deviation, above 0.

    Returns:
        ``[T, E]``, with gradient.

    Source: V-MoE, eq. 9: ``1 - Phi((threshold - logit) / sigma)``.
    """
    threshold_T = noisy_TE.gather(1, expert_TK).amin(-1, keepdim=True)
    load_TE: Tensor = torch.special.ndtr((logits_TE - threshold_T) / noise)
    return load_TE
