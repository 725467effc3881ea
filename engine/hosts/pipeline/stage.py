"""The module that DeepSpeed calls for each micro-batch: the passes of one pipeline stage."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from engine.hosts.micro_batch import LayoutKey, PlanLayout
from engine.hosts.pipeline.crossing import Crossing
from engine.hosts.pipeline.packing import Packed, pack, unpack
from engine.hosts.pipeline.place import Place
from engine.hosts.pipeline.reads import Notes, ReadState, notes_of, unread
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
    """

    layer: ChainLayer
    number: int
    made: bool


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
    ) -> None:
        super().__init__()
        self.layers, self._place, self.sign = nn.ModuleList(layers), place, sign
        self._passes, self._plan_layout = tuple(passes), plan_layout
        self._layers_passed = list({id(one.layer): one.layer for one in passes if one.made}.values())
        self.fillers = nn.ParameterList()
        self.collected, self.crossing = StepScalars(), crossing
        self.first: deque[tuple[State, LayoutKey]] = deque()
        self.notes: dict[LayoutKey, Notes] = {}

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
        with made_ready([layer.copies for layer in self._layers_passed if not layer.recomputes]):
            for one in self._passes:
                if one.made:
                    state = one.layer(state)
                else:
                    assert not one.layer.acts_on_pass(state.layout, one.number), "a pass was left out that has work"
        if self._place.is_last:
            self.collected.add(scalars(state))
        if isinstance(received, ReadState):
            self.notes[key], state = notes_of(received, state), unread(state)
        if not self._place.is_last:
            return pack(state, token, key, self.crossing.wanted(key))
        return state["loss"] + 0.0 * token.sum()
