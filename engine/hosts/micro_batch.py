"""From a micro-batch to the first state of the chain, on the device of the host."""

from typing import NamedTuple, Protocol, Self

import torch

from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch, DataKind


class PlanLayout(Protocol):
    """Which passes a step makes: ``omnivl.chain.layout.plan_layout`` with the stage's objectives bound to it."""

    def __call__(self, kind: DataKind, batch_size: int, num_frames: int, entry: str) -> StepLayout:
        """The layout of a micro-batch of ``batch_size`` samples of an entry, with ``num_frames`` frames each."""


class LayoutKey(NamedTuple):
    """The properties of a micro-batch that determine its layout: the arguments of ``PlanLayout``."""

    kind: DataKind
    batch_size: int
    num_frames: int
    entry: str

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """The key of a micro-batch."""
        return cls(batch.kind, batch.size, batch.num_frames, batch.entry)


def first_state(batch: Batch, plan_layout: PlanLayout, device: torch.device) -> State:
    """The state at the head of the chain for one micro-batch, its tensors on ``device``."""
    state = State.from_batch(batch, plan_layout(*LayoutKey.of(batch)))
    return State({name: tensor.to(device, non_blocking=True) for name, tensor in state.items()}, state.layout)
