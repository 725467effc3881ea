"""What every host offers to the stage loop. The loop never asks which host it has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from omnivl.data.batch import Batch
from omnivl.model.chain import Chain
from omnivl.model.gather import Gather


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports. All figures are averages over replicas, equal on every replica.

    Attributes:
        loss: The weighted total, averaged over micro-batches.
        losses: Raw losses by objective, averaged over the micro-batches in which the objective was active.
        metrics: Detached metrics by ``objective/name``, averaged likewise.
        gradient_norm: Global norm before clipping.
        learning_rates: By parameter group.
        skipped: True where a loss or gradient was not finite and the weights, momentum and queue did not move.
    """

    loss: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    gradient_norm: float
    learning_rates: Mapping[str, float]
    skipped: bool


class Host(Protocol):
    """A chain with an optimizer, on some number of replicas."""

    @property
    def chain(self) -> Chain:
        """The module; its layers may be called for evaluation, by every replica in the same order."""

    @property
    def gather(self) -> Gather:
        """Joins tensors over data-parallel replicas."""

    @property
    def device(self) -> torch.device:
        """Where the chain lives."""

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Forward and backward over ``gradient_accumulation_steps`` micro-batches, one optimizer step, ``after_step``.

        Args:
            batches: This replica's micro-batches; kinds are equal on every replica.
            step: Index of the optimizer step, from 0; sets learning rates.
        """

    def save(self, folder: Path) -> None:
        """Writes everything needed to go on exactly: weights, buffers, optimizer, twins. Called by every replica."""

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote, on the same layout. Called by every replica."""

    def full_weights(self) -> Mapping[str, Tensor] | None:
        """All parameters and buffers, whole, fp32, on the CPU of replica 0; None elsewhere. Called by every replica."""

    def barrier(self) -> None:
        """Waits for every replica."""
