"""What an objective is: a stateless description of what it corrupts, which passes it needs and how its loss is made.

Parameters never live in an objective. Heads are built by it but owned by the chain's last layer (or by ``Contrast``),
so that an objective can be pickled into a data worker and a pipeline stage holds only the parameters that it needs.

Life of an objective within one step:

1. ``prepare`` (in a data worker, on the CPU): draws masks and the like from the batch; a pure function of the sample's
   position. Results travel in ``Batch.prepared`` under ``name/...``.
2. ``demands``: which streams and how many stacked rows the chain has to compute. Pure function of kind and size.
3. ``loss`` (in the chain's last layer, or in ``Contrast`` for contrastive losses).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import UserError
from omnivl.randomness import Streams, uniforms

if TYPE_CHECKING:
    from omnivl.parts.config import ModelConfig


@dataclass(frozen=True)
class PrepareContext:
    """What ``prepare`` may know besides the batch.

    Attributes:
        seed: The stage's seed.
        source: Name of the data entry, part of every random key.
        tokens: Special token ids.
        grid: Patches per side of a frame of this kind, (rows, columns).
        step: Optimizer step, for schedules of targets.
        tubelet_size: Frames per temporal position of a clip of this kind; masks are per tubelet. 1 for images.
    """

    seed: int
    source: str
    tokens: SpecialTokens
    grid: tuple[int, int]
    step: int
    tubelet_size: int = 1

    def uniforms(self, purpose: str, batch: Batch, count: int) -> NDArray[np.float64]:
        """``count`` numbers in [0, 1) for every sample of a batch, ``[B, count]``."""
        return uniforms(batch.position.tolist(), count, self.seed, self.source, purpose)

    def streams(self, purpose: str) -> Streams:
        """The generators of a batch's samples for one purpose, by position."""
        return Streams(self.seed, self.source, purpose)


@dataclass(frozen=True)
class Demands:
    """What the chain must compute for an objective on one kind of batch.

    Attributes:
        visual: The clean visual stream, all positions.
        text: The clean text stream, all positions.
        embeddings: Projected embeddings of both clean streams; by themselves they need the first position only.
        momentum: The momentum twins' streams.
        generation: The causal stream over ``lm/token_ids``.
        masked_visual: Rows of masked visual passes by segment name; they read ``{segment}/rows`` int64 [M] and
            ``{segment}/mask`` bool [M, T, N] from ``Batch.prepared``.
        masked_text: Rows of masked text passes by segment name; they read ``{segment}/token_ids`` int64 [M, L], rows
            0..M-1 of the batch.
        alignment: Alignment rows by segment name. A segment that is a masked text's too has that text; one that is a
            masked visual's too looks at that instead of the clean visual, which only the unified transformer does.
    """

    visual: bool = False
    text: bool = False
    embeddings: bool = False
    momentum: bool = False
    generation: bool = False
    masked_visual: Mapping[str, int] = field(default_factory=dict)
    masked_text: Mapping[str, int] = field(default_factory=dict)
    alignment: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveLoss:
    """A raw (unweighted) loss and its detached metrics.

    Attributes:
        loss: fp32 scalar. Averaged over replicas it equals the loss of the joined batch.
        metrics: Detached fp32 scalars by short name (``accuracy``, ``temperature`` ...).
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all objectives. Instances are small, frozen and picklable, and are their own configuration.

    Every member has a field ``kind: Literal[...]`` that tells it apart in a plan.

    Attributes:
        weight: Factor of the loss in the total.
        weight_warmup_steps: The weight rises linearly over this many optimizer steps; 0 for none.
    """

    weight: float = 1.0
    weight_warmup_steps: int = 0

    uses_vocabulary_head: ClassVar[bool] = False
    """Whether ``loss`` gets the vocabulary head that all share: instead of a head of its own, or where it has one too,
    both in a ``ModuleDict`` as ``vocabulary`` and ``own``."""

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        self.require(self.weight >= 0.0, "weight", "at least 0")
        self.require(self.weight_warmup_steps >= 0, "weight_warmup_steps", "at least 0")

    @property
    def name(self) -> str:
        """Name in states, logs and random keys: the ``kind``."""
        kind: str = self.kind  # type: ignore[attr-defined]  # every member declares it as a Literal of its own
        return kind

    @property
    def uses_momentum(self) -> bool:
        """Whether the objective reads momentum twins, on any kind of batch."""
        return False

    def weight_at(self, step: int) -> float:
        """The weight in optimizer step ``step``, counted from 0. The ramp ends at step ``weight_warmup_steps - 1``."""
        return self.weight * ramp(step, self.weight_warmup_steps)

    def require(self, holds: bool, option: str, allowed: str) -> None:
        """Refuses an option's value.

        Raises:
            UserError: ``holds`` is false.
        """
        if not holds:
            raise UserError(f"objective {self.name}: {option} must be {allowed}, got {getattr(self, option)!r}")

    @abstractmethod
    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """What to compute for a batch of ``kind``; None where the objective does not apply."""

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws this objective's inputs, named ``{self.name}/...``. Called only where ``demands`` is not None."""
        return {}

    def build_head(self, config: "ModelConfig") -> nn.Module | None:
        """Parameters that only this objective needs, owned by the chain's ``Losses`` layer."""
        return None

    @abstractmethod
    def loss(self, state: State, head: nn.Module | None, gather: Gather) -> ObjectiveLoss:
        """The raw loss from the state at the end of the chain."""


def ramp(step: int, warmup_steps: int) -> float:
    """A factor that rises linearly from ``1 / warmup_steps`` at step 0 to 1; always 1 where ``warmup_steps`` is 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def replica_mean(total: Tensor, count: Tensor, gather: Gather) -> Tensor:
    """A mean over a count that differs between replicas.

    Averaged over replicas the result is the mean over the joined batch, and so is its gradient.

    Args:
        total: fp32 scalar, this replica's sum.
        count: Scalar, this replica's number of terms (or their weights' sum), no gradient.
        gather: Sums the counts.

    Returns:
        ``total * replicas / joined count``; 0, still part of the graph, where the joined count is 0.
    """
    joined = gather.total(count.detach().to(torch.float32))
    return total * (gather.replicas / torch.where(joined > 0, joined, 1.0))
