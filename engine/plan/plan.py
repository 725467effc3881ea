"""The plan: what a run is, as data. One YAML file becomes one frozen, typed ``Plan`` (see ``engine.plan.parse``).

Every other component receives only its own section. Configurations live beside the component that they configure; here
are the sections that belong to no single component, and the plan that holds them all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from engine.plan.parallel import BatchConfig, LaunchConfig, ParallelConfig
from engine.plan.yaml import write_yaml
from engine.step.adapters import LoraConfig
from engine.step.guard import GuardConfig
from engine.step.optimizer import OptimizerConfig
from moe.ranges import Range
from omnivl.architectures import ArchitectureConfig, OmniVL
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import StepLayout
from omnivl.data.config import DataEntryConfig, LoaderConfig, entry_keys
from omnivl.objectives import ObjectiveConfig
from omnivl.pretrained.load import PARTS, Part
from omnivl.tasks import TaskConfig

SHARED_SECTIONS = ("model", "parallel", "batch")
"""Sections of the plan that a stage may override, field by field."""


@dataclass(frozen=True)
class WeightsConfig:
    """Weights of other origin that a stage starts from: Hugging Face folders (``docs/huggingface.md``).

    A folder that ``omnivl export`` wrote may stand at each key.

    Attributes:
        all: Folder for all parts of the model: a BLIP, or an exported model; null for none.
        vision: Folder for the visual encoder, and its projection if it has one: a ViT, TimeSformer, BEiT, CLIP or BLIP.
        text: Folder for the text encoder, and its projection if it has one: a BERT or BLIP.
        language: Folder for the language model: an OPT.
    """

    all: str | None = None
    vision: str | None = None
    text: str | None = None
    language: str | None = None

    @property
    def folders(self) -> dict[Part, str]:
        """The folders by the part of the model that they fill, the whole model first."""
        named = {part: getattr(self, part) for part in PARTS}
        return {part: folder for part, folder in named.items() if folder is not None}


@dataclass(frozen=True)
class CurvePlan:
    """Cheap scores by time, so that one sees a stage learn: before its first step, during it, and after its last step.

    The console, TensorBoard and the report show them. They change nothing that is trained, choose no checkpoint, and
    stand in ``curve.jsonl``, as the steps at which they are taken depend on the machine.

    Attributes:
        every_seconds: Seconds of training between two of them.
        largest_share: Share of the time of training that they may take: after one that took longer than this share of
            the interval, the next one comes later, and the run says when.
        tasks: What is evaluated: a retrieval with few samples and without ``rerank`` is cheap.
    """

    every_seconds: Annotated[float, Range(above=0)] = 60.0
    largest_share: Annotated[float, Range(above=0, high=1)] = 0.05
    tasks: tuple[TaskConfig, ...] = ()


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated during a stage and after it.

    Attributes:
        every: Optimizer steps between evaluations; 0 evaluates only after the last step.
        tasks: What is evaluated. A bare kind (``retrieval``) stands for that task with its defaults.
        curve: What is evaluated by time.
        keep_best: The figure whose best checkpoint is kept, in place of ``checkpoint.keep_best``: for stages with other
            tasks than the others.
    """

    every: Annotated[int, Range(0)] = 0
    tasks: tuple[TaskConfig, ...] = ()
    curve: CurvePlan = field(default_factory=CurvePlan)
    keep_best: str | None = None

    @property
    def lists(self) -> tuple[tuple[tuple[str, ...], tuple[TaskConfig, ...]], ...]:
        """The lists of tasks, with their places in the section."""
        return (("tasks",), self.tasks), (("curve", "tasks"), self.curve.tasks)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every: Optimizer steps between checkpoints; the last step of a stage is always saved.
        keep_last: Number of newest checkpoints of a stage to keep.
        keep_best: Name of an evaluation figure, ``TASK/FIGURE``, whose best checkpoint is kept as well; null for none.
            A stage may name another (``evaluate.keep_best``).
        best_is: Which value of it is best; ``auto``: the one that the task says, which is the lowest of errors, ranks
            and distances (``MAE``, ``mean rank``), and the highest of most figures.
        asynchronous: Write while training continues. Every process then needs host memory for a copy of its shard: its
            share of 12 bytes for each trained parameter and 4 for each other one.
    """

    every: Annotated[int, Range(1)] = 500
    keep_last: Annotated[int, Range(1)] = 2
    keep_best: str | None = None
    best_is: Literal["auto", "highest", "lowest"] = "auto"
    asynchronous: bool = True


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training.

    Attributes:
        every: Optimizer steps between two lines of metrics.
        tensorboard: Whether TensorBoard files are written beside ``metrics.jsonl``.
    """

    every: Annotated[int, Range(1)] = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class BatchSort:
    """Micro-batches of a stage that have the same passes.

    Attributes:
        key: Key of one of their data entries.
        entry: That data entry.
        layout: The step layout of a training step on them.
        share: Share of all micro-batches, from 0 to 1.
    """

    key: str
    entry: DataEntryConfig
    layout: StepLayout
    share: float


@dataclass(frozen=True)
class StagePlan:
    """One stage: a number of steps of some objectives on a mixture of data.

    Its sections are complete: sections that a plan shares between stages are already merged in.

    Attributes:
        name: Name of the stage: letters, digits, ``-``, ``_`` and ``.``; no two stages share it.
        steps: Optimizer steps. A stage gives them or ``epochs``.
        data: The mixture. The kind of each micro-batch is drawn from the entries' weights.
        objectives: What is trained. A bare kind (``mlm``) stands for that objective with its defaults.
        epochs: Passes over the first entry of ``data`` with a weight above 0, instead of ``steps``: with n samples
            after ``where``, a share w of the mixture and b samples in a step, ``epochs * n / (b * w)`` steps, rounded
            up. Streams have no known number of samples. A run keeps the steps, so that it goes on with as many when
            data or batch have changed.
        optimizer: AdamW or Muon, learning rate and clipping.
        init_from: Earlier stage whose weights this one starts from; null starts from random weights.
        weights: Weights of other origin to start from. Of them ``language`` alone may stand beside ``init_from``.
        freeze: Parts that are not trained: patterns over the beginnings of parameter names, e.g. ``[embed, text_*]``.
        lora: Low-rank adapters, which are trained with the heads in place of all other parameters; null for none.
        model: Fields of ``model`` that change for this stage, e.g. ``{num_frames: 8}``.
        parallel: Fields of ``parallel`` that change for this stage.
        batch: Fields of ``batch`` that change for this stage.
        evaluate: What is evaluated during the stage and after it.
    """

    name: str
    steps: Annotated[int, Range(1)]
    data: tuple[DataEntryConfig, ...]
    objectives: tuple[ObjectiveConfig, ...]
    epochs: Annotated[float, Range(above=0)] | None = field(default=None, compare=False)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init_from: str | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    freeze: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    model: ArchitectureConfig = field(default_factory=OmniVL)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    evaluate: EvaluationPlan = field(default_factory=EvaluationPlan)

    def samples_per_step(self, world_size: int) -> int:
        """Samples of one optimizer step over ``world_size`` processes."""
        return self.samples_per_replica * self.parallel.replicas(world_size)

    @property
    def samples_per_replica(self) -> int:
        """Samples of one optimizer step on one replica."""
        return self.batch.micro_batch_size_per_gpu * self.batch.gradient_accumulation_steps

    @property
    def compared_within_a_micro_batch(self) -> list[str]:
        """Keys of the objectives for which a micro-batch is not as good as its share of the step.

        None without accumulation; see ``Objective.compares_samples``.
        """
        accumulates = self.batch.gradient_accumulation_steps > 1
        return [
            one.key
            for one in self.objectives
            if accumulates
            and one.compares_samples
            and not (one.compares_embeddings and self.batch.contrast == "global")
        ]

    @property
    def contrasts_step(self) -> bool:
        """Whether objectives that compare embeddings compare those of all micro-batches of a step."""
        accumulates = self.batch.contrast == "global" and self.batch.gradient_accumulation_steps > 1
        return accumulates and any(one.compares_embeddings for one in self.objectives)

    def layouts(self) -> list[StepLayout]:
        """The different step layouts of the stage."""
        return [sort.layout for sort in self.batch_sorts()]

    def batch_sorts(self) -> list[BatchSort]:
        """The stage's micro-batches, ordered by kind. Entries whose passes are the same are joined."""
        size, clip = self.batch.micro_batch_size_per_gpu, self.model.inputs.num_frames
        total = sum(entry.weight for entry in self.data)
        sorts: list[BatchSort] = []
        keyed = zip(entry_keys(self.data), self.data, strict=True)
        for key, entry in sorted(keyed, key=lambda pair: pair[1].kind):
            layout = plan_layout(self.objectives, entry.kind, size, entry.num_frames(clip), key)
            known = next((place for place, sort in enumerate(sorts) if sort.layout == layout), None)
            if known is not None:
                sorts[known] = replace(sorts[known], share=sorts[known].share + entry.weight / total)
            elif entry.weight > 0:
                sorts.append(BatchSort(key, entry, layout, entry.weight / total))
        return sorts


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        name: Name of the run and of its folder: letters, digits, ``-``, ``_`` and ``.``.
        stages: The stages, in the order in which they run.
        seed: Seeds weights, data order, masks and augmentation.
        tokenizer: ``emoji`` (the vocabulary of the embedded data), a WordPiece ``vocab.txt``, or a Hugging Face folder.
        model: ``preset`` names a row of the table of presets or a model file (``configs/models/``), every other field
            overrides it. ``vocab_size`` is the tokenizer's where it is not given. ``ffn`` fills the feed-forward slots
            of all stacks, also where each has its own (``vision: {ffn: ...}``), which then goes before.
        parallel: Host, ZeRO stage, precision.
        launch: Processes.
        batch: Batch sizes.
        loader: How samples are read and decoded.
        checkpoint: When checkpoints are written and which are kept.
        guard: Reaction to losses that are not finite or spike, and to processes that hang.
        logging: What is written while training.
    """

    name: str
    stages: tuple[StagePlan, ...]
    seed: int = 0
    tokenizer: str = "emoji"
    model: ArchitectureConfig = field(default_factory=OmniVL)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def stage(self, name: str) -> StagePlan:
        """The stage of that name.

        Raises:
            KeyError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def ancestors(self, stage: StagePlan) -> list[StagePlan]:
        """The stages that a stage descends from, nearest first."""
        found: list[StagePlan] = []
        while stage.init_from is not None:
            stage = self.stage(stage.init_from)
            found.append(stage)
        return found

    def to_yaml(self) -> str:
        """The resolved plan: every field written out, so that it does not depend on later defaults.

        ``engine.plan.parse.parse_plan`` reads it back to an equal plan. Of a stage's shared sections only what differs
        from the plan's is written, and of ``steps`` and ``epochs`` the steps.
        """
        tree = asdict(self)
        for stage in tree["stages"]:
            stage["epochs"] = None
            for section in SHARED_SECTIONS:
                stage[section] = _differing(stage[section], tree[section])
        return write_yaml(_plain(tree))


def _differing(fields: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value != base[name]}


def _plain(value: Any) -> Any:
    """Tuples as lists, which is how YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value
