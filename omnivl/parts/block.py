"""Base classes of the transformer layers of the chain: recomputation, momentum twins and sums for routing losses."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe.modality import ModalityFeedForward
from moe.sparse import SparseFeedForward
from omnivl.chain.backward import TEXT, VISUAL
from omnivl.chain.chain import ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.momentum import ema_update_, frozen_twin
from omnivl.chain.state import State
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MomentumConfig, Transformer


class BlockLayer(ChainLayer):
    """A chain layer around one online module and, if an objective needs it, its momentum twin.

    Attributes:
        block: The module that is trained.
        momentum_block: Its twin, or None.
        gather: How to see the other replicas.
        tokens_per_expert: Choices of each expert, served or not, since the last optimizer step, by the slot's name in
            the block; only for slots whose router balances its experts after the step.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[bool], nn.Module],
        *,
        momentum: MomentumConfig | None = None,
    ) -> None:
        """Builds the module and its twin.

        Args:
            name: The layer's name in the chain; routing losses carry it.
            build: Makes the module. Called a second time, with true, for the twin, whose forward pass draws nothing at
                random.
            momentum: Of the twin; None builds none.
        """
        super().__init__()
        self.name, self.momentum = name, momentum
        self.gather: Gather = LocalGather()
        self.tokens_per_expert: dict[str, Tensor] = {}
        self.block = build(False)
        # Slots with a router, by their names in the block.
        modules = self.block.named_modules()
        self._routed = {name: one for name, one in modules if isinstance(one, SparseFeedForward)}
        self.momentum_block: nn.Module | None = None
        if momentum is not None:
            self.momentum_block = frozen_twin(build(True), self.block)

    def run(self, *inputs: Any) -> Any:
        """Calls the block; the backward pass recomputes its activations if the configuration says so."""
        return recomputed(self.recomputes, self.block, *inputs, whole=True)

    def compile_blocks(self, **options: Any) -> None:
        """Has ``torch.compile``, with these options, compile the module and its twin when they are called first."""
        for block in (self.block, self.momentum_block):
            if block is not None:
                block.compile(**options)

    @torch.no_grad()
    def run_twin(self, *inputs: Any) -> Any:
        """Calls the momentum twin without building a graph."""
        assert self.momentum_block is not None, f"{self.name}: the layout asks for a momentum twin, none was built"
        return self.momentum_block(*inputs)

    def after_step(self) -> None:
        """Balances the experts' selection, then updates the momentum twin."""
        for name, chosen in self.tokens_per_expert.items():
            self._routed[name].after_step(self.gather.total(chosen))
        self.tokens_per_expert = {}
        if self.momentum_block is not None:
            assert self.momentum is not None
            ema_update_(self.momentum_block, self.block, self.momentum.decay, self.local_storage)

    def discard_step(self) -> None:
        """Clears ``tokens_per_expert``."""
        self.tokens_per_expert = {}

    def step_sums(self) -> tuple[Tensor, ...]:
        """``tokens_per_expert``, slot by slot."""
        for name, slot in self._routed.items():
            if slot.router.balances and name not in self.tokens_per_expert:
                device = next(slot.parameters()).device
                self.tokens_per_expert[name] = torch.zeros(slot.experts.num_experts, device=device)
        return tuple(self.tokens_per_expert[name] for name in sorted(self.tokens_per_expert))

    def with_routing(self, state: State, router_sums: Tensor | Mapping[str, Tensor] | None) -> State:
        """Adds the sums of a block's routers as ``router/{layer}``; the last layer computes the losses from them.

        Args:
            state: The state that the layer returns.
            router_sums: The sums that the block's slot returned. A block with several slots gives the sums of each by
                its name in the block; they are added as ``router/{layer}/{slot}``. None: nothing was routed.
        """
        if router_sums is None:
            return state
        slots = self._routed
        if isinstance(router_sums, Tensor):
            assert len(slots) == 1, f"{self.name}: one vector of sums for {len(slots)} routed slots: {', '.join(slots)}"
            places = dict.fromkeys(slots, f"router/{self.name}")
            router_sums = dict.fromkeys(slots, router_sums)
        else:
            unknown = router_sums.keys() - slots.keys()
            assert not unknown, f"{self.name}: sums of {sorted(unknown)}, routed slots are {', '.join(slots)}"
            places = {name: f"router/{self.name}/{name}" for name in router_sums}
        for name, sums in router_sums.items():
            place = places[name]
            if slots[name].router.balances and torch.is_grad_enabled():
                chosen = slots[name].tokens_per_expert(sums)
                before = self.tokens_per_expert.get(name)
                self.tokens_per_expert[name] = chosen if before is None else before + chosen
            # A block that runs twice in a step adds to its first sums.
            state = state.merged({place: state[place] + sums if place in state else sums})
        return state

    def idle_experts(self, reached: Collection[tuple[str, bool]]) -> Iterator[nn.Parameter]:
        """Experts by modality, in any slot, that no token uses if all tokens are of the kinds in ``reached``.

        Args:
            reached: (modality, fused) of the tokens, see ``moe.tokens.Segment``.
        """
        for module in self.block.modules():
            if isinstance(module, ModalityFeedForward):
                yield from module.idle(reached)


class StackBlock(BlockLayer):
    """A block of a stack, under the name ``{stack}_{index}``."""

    def __init__(
        self,
        index: int,
        sizes: Transformer,
        build: Callable[[Transformer], nn.Module],
        momentum: MomentumConfig | None = None,
    ) -> None:
        """Builds the module and its twin.

        Args:
            index: Which block of its stack it is.
            sizes: Of the stack.
            build: Makes the module of the sizes that this block has. Called a second time for the twin, whose forward
                pass draws nothing at random.
            momentum: Of the twin; None builds none.
        """
        own = sizes.at_block(index)
        name = f"{self.stack}_{index:02d}"
        super().__init__(name, lambda still: build(own.still() if still else own), momentum=momentum)
        self.level = index
        self.recomputes = own.recompute == "block"  # other modes are applied inside the block


class EmbeddingLayer(BlockLayer):
    """The first layer of a chain: pixels and token ids to the start of each stream.

    Attributes:
        dtype: The compute dtype: every stream starts in it. Inference may change it.
    """

    stack, level, branch = "embed", -1, TEXT

    def __init__(
        self, build: Callable[[bool], nn.Module], dtype: torch.dtype, momentum: MomentumConfig | None = None
    ) -> None:
        """Builds the embeddings and their twin.

        Args:
            build: See ``BlockLayer``.
            dtype: See the class.
            momentum: Of the twin; None builds none.
        """
        super().__init__("embed", build, momentum=momentum)
        self.dtype = dtype

    def branch_of(self, name: str) -> str | None:
        """``VISUAL`` for what is in a module of that name, ``TEXT`` for all else."""
        return VISUAL if "visual" in name.split(".") else TEXT
