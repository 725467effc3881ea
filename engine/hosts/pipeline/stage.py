"""The module that DeepSpeed calls for each micro-batch: the passes of one pipeline stage."""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from engine.hosts.contrast import Draws, StepContrast
from engine.hosts.micro_batch import LayoutKey, PlanLayout
from engine.hosts.pipeline.crossing import Crossing
from engine.hosts.pipeline.packing import Packed, pack, unpack
from engine.hosts.pipeline.place import Place
from engine.hosts.pipeline.reads import Notes, ReadState, Wanted, notes_of, unread
from engine.step.report import StepScalars, scalars
from moe.working import made_ready
from omnivl.chain.chain import ChainLayer
from omnivl.chain.state import State


@dataclass(frozen=True)
class StagePass:
    """A pass of a layer on a stage.

    Attributes:
        layer: Name of the layer.
        number: How often it was passed before, on whatever stage.
        made: Whether any step uses the pass; if not, its layer may be absent.
        embeds: Whether the contrastive embeddings need it, or are made by it.
    """

    layer: ChainLayer
    number: int
    made: bool
    embeds: bool = True


class PipelineStage(nn.Module):
    """The passes of one stage, as one layer of DeepSpeed's module.

    Attributes:
        layers: Layers that the stage trains. Copies of layers that another stage trains are not part of the module, so
            that DeepSpeed does not handle them.
        fillers: Elements without a gradient, one for each optimizer group without parameters on this stage: DeepSpeed
            computes the norm group by group over all stages.
        sign: ``ExpertParallel.sign``, which is never called.
        collected: Scalars of the step's micro-batches; on the last stage.
        crossing: What the stage sends and receives.
        first: The states of the step and their keys; on the first stage.
        cached: What stands in place of losses in the micro-batches to come; on the last stage.
        draws: Random numbers of the step's micro-batches, where they are drawn twice.
        notes: What the passes did to the first state of each key; on the others.
    """

    def __init__(
        self,
        passes: Sequence[StagePass],
        layers: Sequence[ChainLayer],
        place: Place,
        crossing: Crossing,
        plan_layout: PlanLayout,
        sign: nn.Module | None,
        *,
        embeds_further: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self._place, self.sign = nn.ModuleList(layers), place, sign
        self._passes, self._plan_layout = tuple(passes), plan_layout
        self._layers_passed = list({id(one.layer): one.layer for one in passes if one.made}.values())
        self.fillers = nn.ParameterList()
        self.collected, self.crossing = StepScalars(), crossing
        self.first: deque[tuple[State, LayoutKey]] = deque()
        self.notes: dict[LayoutKey, Notes] = {}
        self.cached: deque[dict[str, Tensor]] = deque()
        self.draws: Draws | None = None
        self._embeds_further, self._count = embeds_further, 0

    def embed(self, given: Packed | tuple[State, LayoutKey], contrast: StepContrast) -> State | None:
        """Runs the passes up to the embeddings, and sends the state on; on the last stage returns it.

        Args:
            given: What the stage before has sent; on the first stage the state itself.
            contrast: Knows what is read of the embeddings.
        """
        if self._place.stage == 0:
            state, key = cast("tuple[State, LayoutKey]", given)
        else:
            state, _, key = unpack(cast(Packed, given), self._plan_layout)
        wanted = contrast.fields(state)
        state = self._passed(state, embeds=True)
        if self._place.is_last:
            return state
        further = self.crossing.wanted(key) if self._embeds_further else frozenset[str]()
        token = torch.zeros(1, device=next(iter(state.values())).device)
        self.crossing.send_state(pack(state, token, key, None if further is None else Wanted(wanted | further)))
        return None

    def begin(self) -> None:
        """Called before the micro-batches of a step."""
        self.collected, self._count = StepScalars(), 0

    def _passed(self, state: State, *, embeds: bool = False) -> State:
        """The state after the stage's passes, or after those up to the embeddings."""
        with made_ready([layer.copies for layer in self._layers_passed if not layer.recomputes]):
            for one in self._passes:
                if embeds and not one.embeds:
                    break
                if one.made:
                    state = one.layer(state)
                else:
                    assert not one.layer.acts_on_pass(state.layout, one.number), "a pass was left out that has work"
        return state

    def forward(self, given: Packed | tuple[Tensor]) -> Packed | Tensor:
        """The packed state after the stage; after the last stage the loss of the micro-batch.

        Args:
            given: The packed state before it; on the first stage any tensor: its states are in ``first``.
        """
        if self._place.stage == 0:
            state, key = self.first.popleft()
            token = torch.zeros(1, device=given[0].device).requires_grad_()
        else:
            state, token, key = unpack(cast(Packed, given), self._plan_layout)
            state = state if key in self.notes else ReadState.of(state)
        received = state
        if self.cached:
            state = state.merged(self.cached.popleft())
        with nullcontext() if self.draws is None else self.draws.of(self._count):
            state = self._passed(state)
        self._count += 1
        if self._place.is_last:
            self.collected.add(scalars(state))
        if isinstance(received, ReadState):
            self.notes[key], state = notes_of(received, state), unread(state)
        if not self._place.is_last:
            return pack(state, token, key, self.crossing.wanted(key))
        return state["loss"] + 0.0 * token.sum()
