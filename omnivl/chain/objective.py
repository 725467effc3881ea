"""The base class of objectives: their random draws, the rows that they need, their heads and losses.

An objective is a stateless, frozen configuration, so that it can be sent to a data worker. Its parameters and buffers
belong to the head that it builds; the chain's last layer owns the heads, so that only the last pipeline stage holds
them.

Order of calls within one step:

1. ``prepare`` (in a data worker, on the CPU): draws masks and the like from the batch; a pure function of the sample's
   position. Results are in ``Batch.prepared`` under ``{key}/...``.
2. ``demands``: which rows the chain has to compute. Pure function of kind and size.
3. ``terms`` (for all micro-batches of the step, before the first is computed): how many terms its means run over.
4. ``draw`` (where rows are joined): chooses other samples for the joins that ask for it.
5. ``loss`` (in the chain's last layer); after the optimizer step the head's ``after_step``.

``predict`` reads the same rows for evaluation, without targets.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omnivl.chain.backward import Backward
from omnivl.chain.demands import Demands
from omnivl.chain.gather import Gather
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DATA_KINDS, Batch, DataKind
from omnivl.data.fields import Field
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader, Tokenizer
from omnivl.errors import Misfit, UserError
from omnivl.randomness import Streams, uniforms

LARGE_BATCH = 2**20
"""A number of samples with which no objective leaves out a batch as too small."""


@dataclass(frozen=True)
class PrepareContext:
    """Inputs of ``prepare`` besides the batch.

    Attributes:
        seed: The stage's seed.
        source: Name of the data entry, part of every random key.
        tokens: Special token ids.
        grid: Patches per side of a frame of this kind, (rows, columns).
        step: Optimizer step, for schedules of targets.
        tubelet_size: Frames per temporal position of a clip of this kind; masks are per tubelet. 1 for images.
        readers: What stacks read texts with, by stack: ``text`` with the plan's tokenizer, and those that have one of
            their own.
    """

    seed: int
    source: str
    tokens: SpecialTokens
    grid: tuple[int, int]
    step: int
    tubelet_size: int = 1
    readers: Mapping[str, TextReader] = field(default_factory=dict)

    def grids(self, batch: Batch) -> list[tuple[int, int]]:
        """Rows and columns of the patches of each sample's frames."""
        if batch.grids is None:
            return [self.grid] * batch.size
        return [(rows, columns) for rows, columns in batch.grids.tolist()]

    def places(self, batch: Batch) -> int:
        """N: the patches of a frame, of the largest one where pictures keep their sizes."""
        return self.grid[0] * self.grid[1] if batch.grids is None else batch.places

    def uniforms(self, purpose: str, batch: Batch, count: int) -> NDArray[np.float64]:
        """``count`` numbers in [0, 1) for every sample of a batch, ``[B, count]``."""
        return uniforms(batch.position.tolist(), count, self.seed, self.source, purpose)

    def streams(self, purpose: str) -> Streams:
        """The generators of a batch's samples for one purpose, by position."""
        return Streams(self.seed, self.source, purpose)


@dataclass(frozen=True)
class Drawn:
    """The samples in the joins whose text or visual is drawn.

    Attributes:
        rows: int64 ``[B]`` by join: the candidate of each row.
        across: Whether the candidates are the samples of all replicas, this replica's first; else this replica's.
        leaves: Values of the draw that ``loss`` needs, by name (``{key}/...``).
    """

    rows: Mapping[str, Tensor]
    across: bool = False
    leaves: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveLoss:
    """A raw (unweighted) loss and its detached metrics.

    Attributes:
        loss: fp32 scalar. Averaged over replicas it equals the loss of the joined batch; averaged over the step's
            micro-batches, too, as far as the objective counts ``terms``.
        metrics: Detached fp32 scalars by short name (``accuracy``, ``temperature`` ...).
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Temperature:
    """The temperature of the comparison of embeddings, for objectives that have one.

    Attributes:
        initial: Initial value.
        bounds: Smallest and largest.
        learnt: Whether it is trained.
    """

    initial: float = 0.07
    bounds: tuple[float, float] = (0.001, 0.5)
    learnt: bool = True


def cached_name(key: str, value: str) -> str:
    """The field of a state that stands in place of an objective's loss, where that was computed before.

    Args:
        key: Of the objective.
        value: ``loss``, ``metric/{name}``, ``of/{field}`` (the gradient at a field of the state) or ``head/{name}``
            (that of a parameter of the head).
    """
    return f"cached/{key}/{value}"


def cached_loss(state: "State", key: str, head: nn.Module | None) -> "ObjectiveLoss | None":
    """A loss with the value and the gradients that were computed before; None where there is none.

    Args:
        state: With ``cached_name``.
        key: Of the objective.
        head: Its head.
    """
    cached = state.named(f"cached/{key}")
    if not cached:
        return None
    parameters = {} if head is None else dict(head.named_parameters())
    products = []
    for name, value in cached.items():
        root, _, rest = name.partition("/")
        if root == "of":
            products.append((state[rest] * value).sum())
        elif root == "head":
            products.append((parameters[rest] * value).sum())
    total = torch.stack(products).sum()
    metrics = {name.partition("/")[2]: value for name, value in cached.items() if name.startswith("metric/")}
    return ObjectiveLoss(cached["loss"] + (total - total.detach()), metrics)


class Head(nn.Module):
    """Parameters and buffers of one objective. ``after_step`` updates them after a step; ``loss`` never does."""

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Operations of ``loss`` in a step, forward and backward; by default 0. See ``omnivl.chain.flops``.

        Args:
            layout: The step.
            backward: What of the backward pass the head has.
        """
        return 0.0

    def after_step(self, gather: Gather) -> None:
        """Called once per optimizer step, after the weights were updated."""

    def discard_step(self) -> None:
        """Called instead of ``after_step`` when a step was skipped: drops values that ``loss`` kept for it."""


@dataclass(frozen=True)
class Heads:
    """Heads that an objective's ``loss`` and ``predict`` get.

    Attributes:
        own: The head that ``build_head`` made; None if it makes none.
        vocabulary: The vocabulary head that all objectives on words share, if ``reads`` names ``vocabulary``.
        momentum_vocabulary: Its momentum twin, if ``reads`` names ``momentum_vocabulary``.
        borrowed: The heads of other objectives that ``borrows`` names, by their keys.
    """

    own: nn.Module | None = None
    vocabulary: nn.Module | None = None
    momentum_vocabulary: nn.Module | None = None
    borrowed: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Writing:
    """How an objective's ``predict`` writes a text, word by word.

    Attributes:
        tokenizer: Turns ids into the text.
        given: Ids that the text begins with, one or more; they are not written.
        end: Id of the token that ends it.
        max_length: Most tokens to write, the end included.
        beside: The text that it looks at where none is given; None: it looks at no text, or at one that must be given.
    """

    tokenizer: Tokenizer
    given: tuple[int, ...]
    end: int
    max_length: int
    beside: str | None = None


@dataclass(frozen=True)
class Objective(ABC):
    """Base of all objectives. Instances are small, frozen and picklable, and are their own configuration.

    Every member has a field ``kind: Literal[...]`` that tells it apart in a plan.

    Attributes:
        weight: Factor of the loss in the total.
        weight_warmup_steps: The weight rises linearly over this many optimizer steps; 0 for none.
        name: Name in logs, heads and random keys, letters, digits and ``_``; the ``kind`` if not given. A kind may
            occur more than once in a stage, under different names.
        on: Data entries of the stage that the objective acts on, by name; all if not given.
    """

    weight: float = 1.0
    weight_warmup_steps: int = 0
    name: str | None = None
    on: tuple[str, ...] = ()

    compares_samples: ClassVar[bool] = False
    """Whether a sample's loss depends on other samples of its micro-batch, so that accumulated ones give it no more."""
    scores_pairs: ClassVar[bool] = False
    """Whether ``predict`` gives each fused row one number, which is the higher the better text and picture match."""
    picture_mark: ClassVar[str] = ""
    """What a text of several pictures says where one stands; empty where texts do not say it."""

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        self.require(self.weight >= 0.0, "weight", "at least 0")
        self.require(self.weight_warmup_steps >= 0, "weight_warmup_steps", "at least 0")
        self.require(self.name is None or self.name.isidentifier(), "name", "letters, digits and '_', no digit first")
        if (temperature := self.temperature_options) is not None:
            low, high = temperature.bounds
            self.require(0.0 < low < high, "temperature_bounds", "two rising numbers above 0")
            fits = low <= temperature.initial <= high
            self.require(fits, "temperature", f"within temperature_bounds, {low} to {high}")

    @property
    def needs_whole_texts(self) -> bool:
        """Whether the texts of a micro-batch must have as many positions as any: they are joined with others.

        Otherwise they are as long as the longest of the micro-batch.
        """
        return False

    @property
    def compares_embeddings(self) -> bool:
        """Whether the loss needs nothing of a sample but its embeddings and identity: it can be one of a whole step."""
        return False

    @property
    def key(self) -> str:
        """Name in states, logs, heads and random keys."""
        kind: str = self.kind  # type: ignore[attr-defined]  # every member declares it as a Literal of its own
        return kind if self.name is None else self.name

    @property
    def borrows(self) -> tuple[str, ...]:
        """Keys of objectives of the stage whose heads it reads beside its own."""
        return ()

    def misfits_beside(self, others: "Mapping[str, Objective]") -> Iterator[Misfit]:
        """Options that do not fit other objectives of the stage, which are given by their keys."""
        return iter(())

    @property
    def pupils(self) -> Sequence[Any]:
        """What of it learns from a finished model: see ``omnivl.objectives.teacher.Pupil``."""
        return ()

    @property
    def head_key(self) -> str:
        """Key of the objective whose ``build_head`` makes the head: by default its own."""
        return self.key

    @property
    def absent_lists(self) -> Mapping[str, str]:
        """Paths of lists whose files were not there when the plan was read, by option."""
        return {}

    def with_stand_ins(self) -> Self:
        """The objective with lists of the stated lengths in place of absent ones, where only sizes count."""
        return self

    @property
    def demands_of_kinds(self) -> Mapping[DataKind, Demands]:
        """The demands for a large batch, by the kinds that the objective applies to."""
        asked = {kind: self.demands(kind, LARGE_BATCH) for kind in DATA_KINDS}
        return {kind: demands for kind, demands in asked.items() if demands is not None}

    @property
    def twins(self) -> frozenset[str]:
        """The streams whose momentum twins the objective reads, on any kind of batch."""
        return frozenset().union(*(demands.twins for demands in self.demands_of_kinds.values()))

    def reads(self, field: str) -> bool:
        """Whether ``loss`` reads a field of the state, on any kind of batch."""
        return any(field in demands.reads for demands in self.demands_of_kinds.values())

    @property
    def trained(self) -> frozenset[str]:
        """The fields whose layers the loss trains, on any kind of batch; see ``Demands.trained``."""
        return frozenset[str]().union(*(demands.trained for demands in self.demands_of_kinds.values()))

    @property
    def temperature_options(self) -> Temperature | None:
        """The objective's temperature of the comparison of embeddings; None if it has none."""
        return None

    @property
    def predicts(self) -> bool:
        """Whether the objective predicts anything, on any kind of data."""
        return any(self.asks(kind, 1) is not None for kind in DATA_KINDS)

    def after_training(self) -> "Objective | None":
        """The objective in an exported model: its head without the parts that only training needs.

        Returns:
            None if inference does not need the objective. By default it needs objectives that predict or have a
            temperature.
        """
        return self.apart() if self.predicts or self.temperature_options is not None else None

    def apart(self) -> Self:
        """The objective without the options of a stage: its weight and its data entries."""
        return replace(self, weight=1.0, weight_warmup_steps=0, on=())

    def acts_on(self, entry: str) -> bool:
        """Whether the objective acts on a data entry."""
        return not self.on or entry in self.on

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """Options that do not fit the sizes of samples or a micro-batch of ``batch_size``."""
        return iter(())

    @property
    def restored_words(self) -> Mapping[str, float]:
        """Share of a masked text's positions whose words are scored, by segment of the text stream.

        By the vocabulary head where ``reads`` names it, else by the one that the objective's own head has as ``words``.
        """
        return {}

    def weight_at(self, step: int) -> float:
        """The weight in optimizer step ``step``, counted from 0. The ramp ends at step ``weight_warmup_steps - 1``."""
        return self.weight * ramp(step, self.weight_warmup_steps)

    def require(self, holds: bool, option: str, allowed: str) -> None:
        """Refuses an option's value.

        Raises:
            UserError: ``holds`` is false.
        """
        if not holds:
            raise UserError(f"objective {self.key}: {option} must be {allowed}, got {getattr(self, option)!r}")

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """Types of the samples' fields that it reads, by the names that it uses."""
        return {}

    @abstractmethod
    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The demands for a batch of ``kind``; None if the objective does not apply."""

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws this objective's inputs, named ``{self.key}/...``. Called only where ``demands`` is not None."""
        return {}

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """How many terms the means in ``loss`` run over, as far as this differs between micro-batches or replicas.

        The host counts them over all micro-batches and replicas of a step; the state of each micro-batch then has
        ``term_weight/{name}`` for ``replica_mean``, so that the step's gradient is that of the joined batch.

        Args:
            state: At the head of the chain, without frames: what the batch holds and ``prepare`` made.
            gather: For counts that depend on other replicas' samples.

        Returns:
            Scalars of this replica and micro-batch, by ``{key}`` or ``{key}/...``; the names follow from the layout.
            By default none: the loss of a step is the mean of those of its micro-batches.
        """
        return {}

    def draw(self, state: State, gather: Gather) -> Drawn:
        """Chooses the samples of the joins with a side that is drawn. Called without a gradient."""
        raise NotImplementedError(f"objective {self.key} has joins to draw for, and no draw")

    def build_head(self, sizes: HeadSizes) -> nn.Module | None:
        """Makes the parameters and buffers of this objective, which the chain's ``Losses`` layer owns."""
        return None

    @abstractmethod
    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The raw loss from the state at the end of the chain."""

    def asks(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The demands for ``predict``; None if the objective predicts nothing."""
        return None

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The predictions of the objective's head for the rows of ``asks``."""
        raise NotImplementedError(f"objective {self.key} predicts nothing")

    def prompt_of(self, labels: Sequence[str]) -> str | None:
        """The text with ``{label}`` in which the objective reads labels; None where it does not know them all."""
        return None

    def writing(self, own: TextReader, readers: Mapping[str, TextReader]) -> Writing | None:
        """How a text is written with ``predict``; None where that predicts no words.

        Args:
            own: The plan's tokenizer, and the model's text length.
            readers: See ``PrepareContext.readers``.
        """
        return None


def temperature_of(objectives: Sequence[Objective]) -> Temperature:
    """The temperature of a stage: that of the first objective that has one."""
    brought = (objective.temperature_options for objective in objectives)
    return next((temperature for temperature in brought if temperature is not None), Temperature())


def ramp(step: int, warmup_steps: int) -> float:
    """A factor that rises linearly from ``1 / warmup_steps`` at step 0 to 1; always 1 where ``warmup_steps`` is 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def replica_mean(total: Tensor, count: Tensor, gather: Gather, term_weight: Tensor | None = None) -> Tensor:
    """A mean over a count that differs between replicas and between the micro-batches of a step.

    Averaged over replicas and micro-batches the result is the mean over the joined batch, and so is its gradient.

    Args:
        total: fp32 scalar, this replica's sum.
        count: Scalar, this replica's number of terms (or their weights' sum), no gradient.
        gather: Sums the counts.
        term_weight: ``State.term_weight``: what a term weighs, counted over the whole step. None: this micro-batch is
            counted alone.

    Returns:
        ``total * term_weight``, or ``total * replicas / joined count``; 0, still part of the graph, where the joined
        count is 0.
    """
    if term_weight is not None:
        return total * term_weight
    return total * weigh_terms(gather.total(count.detach().to(torch.float32)), gather.replicas)


def weigh_terms(joined: Tensor, parts: int) -> Tensor:
    """What a term weighs in a loss that is averaged over parts (replicas, micro-batches).

    Args:
        joined: fp32, the number of terms of all parts.
        parts: Their number.

    Returns:
        ``parts / joined``; finite where there is no term.
    """
    weight: Tensor = parts / joined.masked_fill(joined <= 0, 1.0)
    return weight
