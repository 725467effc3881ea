"""The module that DeepSpeed calls for each micro-batch: the passes of one pipeline stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.hosts.micro_batch import PlanLayout
from engine.hosts.pipeline.packing import pack, unpack
from engine.hosts.pipeline.place import Place
from engine.step.report import StepScalars, scalars
from moe.working import made_ready
from omnivl.chain.chain import ChainLayer


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
    """

    def __init__(
        self,
        passes: Sequence[StagePass],
        layers: Sequence[ChainLayer],
        place: Place,
        plan_layout: PlanLayout,
        sign: nn.Module | None,
    ) -> None:
        super().__init__()
        self.layers, self._place, self.sign = nn.ModuleList(layers), place, sign
        self._passes, self._plan_layout = tuple(passes), plan_layout
        self._layers_passed = list({id(one.layer): one.layer for one in passes if one.made}.values())
        self.fillers = nn.ParameterList()
        self.collected = StepScalars()

    def forward(self, packed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        """The packed state after the stage; after the last stage the loss of the micro-batch."""
        state, token, key = unpack(*packed, self._plan_layout)
        if self._place.stage == 0:
            token = torch.zeros_like(token).requires_grad_()
        with made_ready([layer.copies for layer in self._layers_passed if not layer.recomputes]):
            for one in self._passes:
                if one.made:
                    state = one.layer(state)
                else:
                    assert not one.layer.acts_on_pass(state.layout, one.number), "a pass was left out that has work"
        if not self._place.is_last:
            return pack(state, token, key)
        self.collected.add(scalars(state))
        return state["loss"] + 0.0 * token.sum()
