"""The interface of all hosts to the stage loop. The loop never asks which host it has."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.hosts.shards import Shard
from engine.step.report import StepResult, Votes, no_votes
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.data.batch import Batch


@dataclass(frozen=True)
class WeightsReport:
    """The outcome of ``load_weights``, by name. Equal on every replica.

    Attributes:
        matched: Copied into the chain.
        missing: In the chain but not given; left unchanged.
        unexpected: Given but not in the chain.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class Host(Protocol):
    """A chain with an optimizer, on some number of replicas."""

    @property
    def chain(self) -> Chain:
        """The module that is trained. The weights of a pipeline's other stages are not here outside ``whole_chain``."""

    @property
    def takes_batches(self) -> bool:
        """Whether this process reads batches; if not, ``step`` may be given none."""

    @property
    def computes_losses(self) -> bool:
        """Whether this process runs the chain's last layer in training."""

    def whole_chain(self) -> AbstractContextManager[Chain]:
        """The chain with all weights here and current, for evaluation, as long as the context lasts.

        Called by every process; within the context all processes call its layers in the same order.
        """

    @property
    def gather(self) -> Gather:
        """Joins tensors over data-parallel replicas."""

    @property
    def device(self) -> torch.device:
        """Where the chain lives."""

    def step(self, batches: Sequence[Batch], step: int, votes: Votes = no_votes) -> StepResult:
        """Forward and backward over ``gradient_accumulation_steps`` micro-batches, one optimizer step, ``after_step``.

        Args:
            batches: This replica's micro-batches; kinds are equal on every replica.
            step: Index of the optimizer step, from 0; sets learning rates.
            votes: Asked once, when the scalars are averaged, and counted with them.
        """

    def shard(self) -> Shard:
        """This process' part of everything that an exact resume needs: weights, buffers, optimizer, twins.

        These are views of the host's memory, which the next step changes: they have to be written or copied before
        that.
        """

    def load(self, folder: Path) -> None:
        """Restores the shards of all processes of any host and any layout. Called by every replica."""

    def load_weights(self, weights: Mapping[str, Tensor] | None, *, strict: bool = True) -> "WeightsReport":
        """Copies whole weights into the chain, and into the optimizer's own copy of them. Called by every replica.

        Args:
            weights: Parameters and buffers by name, as ``full_weights`` returns them. Read on replica 0 only.
            strict: Refuse names that are missing or unexpected instead of reporting them.

        Raises:
            CheckpointError: A name is missing or unexpected under ``strict``, or a shape differs.
        """

    def full_weights(self) -> Mapping[str, Tensor] | None:
        """All parameters and buffers, whole, fp32, on the CPU of replica 0; None elsewhere. Called by every replica."""

    def announced_weights(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and whole shape of what ``each_weight`` gives, by name."""

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """What ``full_weights`` returns, one tensor after the other, so that no process ever holds them all.

        Every replica has to call it and to iterate to the end. It yields tensors on replica 0 only.
        """

    def barrier(self) -> None:
        """Waits for every replica."""
