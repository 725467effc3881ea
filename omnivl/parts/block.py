"""What the transformer layers of the chain share: recomputation, momentum twins and the way of routing losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import without_noise
from moe.sparse import SparseFeedForward
from omnivl.chain.chain import ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.momentum import ema_update_, frozen_twin
from omnivl.chain.state import State
from omnivl.parts.config import ModelConfig
from omnivl.parts.recompute import recomputed


class BlockLayer(ChainLayer):
    """A chain layer around one online module and, where wanted, its momentum twin.

    Attributes:
        block: The module that is trained.
        momentum_block: Its twin, or None.
        gather: How to see the other replicas.
        tokens_per_expert: What the experts served since the last optimizer step, where their selection is balanced
            after it.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        build: Callable[[ModelConfig], nn.Module],
        *,
        index: int | None = None,
        twin: bool = False,
    ) -> None:
        """Builds the module and its twin.

        Args:
            name: The layer's name in the chain; routing losses carry it.
            config: The model's configuration.
            build: Makes the module. Called a second time, without anything dropped, for the twin.
            index: Which block of its stack it is; None for a layer that is none.
            twin: Whether to build a momentum twin.
        """
        super().__init__()
        self.name, self.config = name, (config := config if index is None else config.at_block(index))
        if index is not None:
            self.level = index
        self.gather: Gather = LocalGather()
        self.tokens_per_expert: Tensor | None = None
        self.block = build(config)
        self.momentum_block: nn.Module | None = None
        if twin and config.momentum is not None:
            still = replace(config, dropout=0.0, drop_path=0.0, patch_dropout=0.0, ffn=without_noise(config.ffn))
            self.momentum_block = frozen_twin(build(still), self.block)

    def run(self, *inputs: Any) -> Any:
        """Calls the block; its activations are recomputed in the backward pass where the configuration says so."""
        return recomputed(self.config.recompute == "block", self.block, *inputs)

    @torch.no_grad()
    def run_twin(self, *inputs: Any) -> Any:
        """Calls the momentum twin without building a graph."""
        assert self.momentum_block is not None, f"{self.name}: the layout asks for a momentum twin, none was built"
        return self.momentum_block(*inputs)

    def after_step(self) -> None:
        """Balances the experts' selection, then moves the momentum twin."""
        balanced = self._balanced_experts
        if balanced is not None and self.tokens_per_expert is not None:
            balanced.after_step(self.gather.total(self.tokens_per_expert))
            self.tokens_per_expert = None
        if self.momentum_block is not None:
            assert self.config.momentum is not None
            ema_update_(self.momentum_block, self.block, self.config.momentum.decay, self.local_storage)

    def discard_step(self) -> None:
        """Forgets what the experts served."""
        self.tokens_per_expert = None

    def with_routing(self, state: State, router_sums: Tensor | None) -> State:
        """Puts what a block's router has to say under ``router/{layer}``, for the last layer to make losses of."""
        if router_sums is None:
            return state
        balanced = self._balanced_experts if torch.is_grad_enabled() else None
        if balanced is not None:
            served = balanced.tokens_per_expert(router_sums)
            self.tokens_per_expert = served if self.tokens_per_expert is None else self.tokens_per_expert + served
        place = f"router/{self.name}"  # a block that runs twice in a step adds to its first sums
        return state.merged({place: state[place] + router_sums if place in state else router_sums})

    @property
    def _balanced_experts(self) -> SparseFeedForward | None:
        """The block's experts, where their selection is balanced after each step."""
        ffn = getattr(self.block, "ffn", None)
        return ffn if isinstance(ffn, SparseFeedForward) and ffn.config.selection_bias_rate > 0 else None
