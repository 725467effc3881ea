"""A finished model as the teacher of another one: frozen, beside the model that is trained and not part of it.

A head holds its teacher as a plain attribute. So it is among no parameters and no buffers: no optimizer, checkpoint or
sharding knows of it, and each process that computes losses has a whole one. The engine loads it (``give_teachers``).

Shapes: B samples, T frames, H x W pixels, L text positions, S visual positions, P projection size, D hidden size of a
stream of the teacher.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moe.working import made_ready
from omnivl.chain.backward import Backward
from omnivl.chain.chain import Chain
from omnivl.chain.demands import CLEAN, EMBEDDINGS
from omnivl.chain.layout import lay_out
from omnivl.chain.objective import Head, Objective
from omnivl.chain.state import State, StepLayout
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit, UserError

FEATURES = ("visual", "text")
"""Streams whose positions can be taught."""


@dataclass(frozen=True)
class Lesson:
    """What a teacher makes of a batch; without gradient.

    Attributes:
        visual: L2-normalised embeddings, fp32 ``[B, P]``, or ``[B, M, P]`` where each sample has M.
        text: fp32 ``[B, P]``.
        scale: 1 / temperature of their comparison, fp32 scalar.
        features: Last states of its encoders by stream, ``[B, S, D]`` and ``[B, L, D]``, as far as asked for.
    """

    visual: Tensor
    text: Tensor
    scale: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Teaching(ABC):
    """What teaches a head."""

    @abstractmethod
    def lesson(self, state: State, widths: Mapping[str, int]) -> Lesson:
        """Embeddings, and features of the streams that ``widths`` names, from the batch in the student's state.

        Args:
            state: The student's at the end of its chain, with ``frames``, ``token_ids`` and ``grids`` if pictures keep
                their sizes.
            widths: D by stream.
        """

    @abstractmethod
    def odds(self, state: State, seen: Tensor) -> Tensor:
        """Log odds that texts match pictures, fp32 ``[B]``.

        Args:
            state: See ``lesson``.
            seen: int64 ``[B]``, the sample whose picture goes with each sample's text.
        """

    @abstractmethod
    def codes(self, state: State, objective: str) -> Tensor:
        """Codes of the patches of the student's images, row by row, int64 ``[B, N]``.

        Args:
            state: See ``lesson``.
            objective: Key of the teacher's objective that makes them.
        """

    def flops(self, layout: StepLayout, objective: str | None = None) -> float:
        """Operations of the teacher in a step: of both encoders, or of what an objective asks for; 0 if it has none."""
        return 0.0


class Teacher(Teaching):
    """A finished chain that teaches.

    Attributes:
        chain: In evaluation mode, on the device of the student, without parameters that are trained.
        matching: Key of its objective that scores pairs; None if it has none.
    """

    def __init__(self, chain: Chain) -> None:
        """Freezes a chain.

        Args:
            chain: With its weights. Its gather is that of one process: pipeline stages may call it apart.
        """
        self.chain = chain.eval().requires_grad_(False)
        self.matching = matching_of(tuple(chain.objectives.values()))
        for layer in chain.layers:
            layer.backward = Backward(inputs=False, weights=0.0, pixels=0.0)

    @torch.no_grad()
    def lesson(self, state: State, widths: Mapping[str, int]) -> Lesson:
        """See ``Teaching``."""
        own = self._layout(state.layout, frozenset(widths))
        given = {name: state[name] for name in ("frames", "token_ids")}
        made = self._run(State(given | self._grids(state), own))
        features = {stream: made.rows(stream, CLEAN) for stream in widths}
        visual, text = (made[name].float() for name in EMBEDDINGS)
        return Lesson(visual, text, made["logit_scale"].float(), features)

    @torch.no_grad()
    def odds(self, state: State, seen: Tensor) -> Tensor:
        """See ``Teaching``."""
        assert self.matching is not None, "checked when the teacher was found"
        kind, count, times = state.layout.kind, state.layout.batch_size, state.layout.num_frames
        asks = self.chain.objectives[self.matching].asks(kind, count)
        layout = lay_out({self.matching: asks}, kind, count, times, "predict")
        given = {"frames": state["frames"], "token_ids": state["token_ids"], "join/rows": seen}
        scores: Tensor = self._run(State(given | self._grids(state), layout))[f"{self.matching}/prediction"]
        return scores.float()

    @torch.no_grad()
    def codes(self, state: State, objective: str) -> Tensor:
        """See ``Teaching``."""
        layout = self._asked(objective, state.layout)
        found: Tensor = self._run(State({"frames": state["frames"]}, layout))[f"{objective}/prediction"]
        return found

    def flops(self, layout: StepLayout, objective: str | None = None) -> float:
        """Of a forward pass."""
        own = self._layout(layout, frozenset()) if objective is None else self._asked(objective, layout)
        passes = ((self.chain.named_layers[name], number) for name, number in self.chain.passes)
        return sum((one.flops(own, None, number) for one, number in passes if one.acts_on_pass(own, number)), start=0.0)

    def _run(self, state: State) -> State:
        with made_ready([layer.copies for layer in self.chain.layers]):
            return self.chain.fold(state)

    def _asked(self, objective: str, student: StepLayout) -> StepLayout:
        asks = self.chain.objectives[objective].asks("image", student.batch_size)
        return lay_out({objective: asks}, "image", student.batch_size, 1, "predict")

    @staticmethod
    def _layout(student: StepLayout, features: frozenset[str]) -> StepLayout:
        rows = {CLEAN: slice(0, student.batch_size)}
        return StepLayout(
            *(student.kind, student.batch_size, student.num_frames, "encode"),
            visual=rows,
            text=rows,
            reads=frozenset((*EMBEDDINGS, "logit_scale")) | features,
            class_only=not features,
        )

    @staticmethod
    def _grids(state: State) -> dict[str, Tensor]:
        return {"grids": state["grids"]} if "grids" in state else {}


class OwnTeacher(Teaching):
    """Stands in where costs are counted and no teacher is loaded: the student's own values, without gradient."""

    def lesson(self, state: State, widths: Mapping[str, int]) -> Lesson:
        """See ``Teaching``."""
        nothing = torch.zeros(1, device=state["frames"].device)
        visual, text, scale = (state.get(name, nothing).detach() for name in (*EMBEDDINGS, "logit_scale"))
        features = {
            stream: (rows := state.rows(stream, CLEAN)).new_zeros(*rows.shape[:2], width)
            for stream, width in widths.items()
        }
        return Lesson(visual, text, scale, features)

    def odds(self, state: State, seen: Tensor) -> Tensor:
        """See ``Teaching``."""
        return torch.zeros(len(seen), device=seen.device)

    def codes(self, state: State, objective: str) -> Tensor:
        """See ``Teaching``; as many for each image as any mask has places."""
        places = max((mask.shape[-1] for name, mask in state.items() if name.endswith("/mask")), default=0)
        return torch.zeros(state.layout.batch_size, places, dtype=torch.int64, device=state["frames"].device)


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher is, as far as its student has to fit it.

    Attributes:
        where: Its place on disk, for messages.
        inputs: Sizes of what it reads.
        streams: Streams of its chain.
        shows: Visual modalities that it reads.
        widths: Widths of its streams.
        matching: Key of its objective that scores pairs; None if it has none.
        codes: Numbers of codes of its picture tokenizers, by the keys of their objectives.
    """

    where: str
    inputs: InputSizes
    streams: Sequence[str]
    shows: Sequence[str]
    widths: Mapping[str, int]
    matching: str | None
    codes: Mapping[str, int] = field(default_factory=dict)


def matching_of(objectives: Sequence[Objective]) -> str | None:
    """Key of the first objective that scores pairs."""
    return next((one.key for one in objectives if one.scores_pairs), None)


class TaughtHead(Head):
    """A head with a teacher.

    Attributes:
        teacher: None until the engine gives one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.teacher: Teaching | None = None

    @property
    def taught_by(self) -> Teaching:
        """The teacher, which has to be there."""
        assert self.teacher is not None, "a head is given its teacher before the first step (give_teachers)"
        return self.teacher


def stand_in_teachers(chain: Chain) -> None:
    """Gives heads without a teacher one that costs nothing, where only costs are counted."""
    for module in chain.modules():
        if isinstance(module, TaughtHead) and module.teacher is None:
            module.teacher = OwnTeacher()


class Pupil:
    """What names a finished model that it learns from: an objective, or a part of one. A frozen dataclass.

    Attributes:
        teacher: Folder of a finished run such as ``runs/quickstart``, or one that ``omnivl export`` wrote; null: an
            earlier stage of this run. It is loaded once at the start of the stage and stays as it is. Every process
            that computes losses holds it whole.
        teacher_stage: Stage of the run; null: the newest complete one of the other run.

    Class attribute ``reads_texts``: whether the teacher reads the student's texts.
    """

    teacher: str | None
    teacher_stage: str | None
    reads_texts: ClassVar[bool] = True

    @property
    def names_teacher(self) -> bool:
        """Whether it names one."""
        return bool(self.teacher) or self.teacher_stage is not None

    def check_teacher(self, key: str, facts: TeacherFacts, own: InputSizes, shown: Sequence[str]) -> None:
        """Refuses a teacher that cannot read the student's batches or lacks what is read of it.

        Args:
            key: Of the objective, for the message.
            facts: The teacher.
            own: Sizes of the student's batches.
            shown: Visual modalities of the stage's data on which the objective acts.

        Raises:
            UserError: Names the first thing that does not fit.
        """
        if found := next(self.unfit(facts, own, shown), None):
            got, allowed, change = found
            raise UserError(f"objective {key}: got teacher {facts.where} {got}; allowed is {allowed}; {change}")

    def unfit(self, facts: TeacherFacts, own: InputSizes, shown: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """What does not fit: what was got, what is allowed, what to change."""
        another = "change the student's model to it, or take another teacher"
        if lacking := [one for one in shown if one not in facts.shows]:
            yield f"that reads no {lacking[0]}s", f"one that reads {', '.join(shown)}", "take another teacher"
        sizes = {"image": ("image_size",), "clip": ("video_size", "num_frames"), "set": ("image_size",)}
        for name in (*(size for one in shown for size in sizes.get(one, ())), "native", "stretched"):
            theirs, ours = getattr(facts.inputs, name), getattr(own, name)
            if theirs != ours:
                yield f"with {name} {theirs}", f"the student's, {ours}, as both read one batch", another
        if own.native and facts.inputs.patch_size != own.patch_size:
            got = f"with patch_size {facts.inputs.patch_size}"
            yield got, f"the student's, {own.patch_size}, where pictures keep their sizes", another
        if self.reads_texts and facts.inputs.text_length < own.text_length:
            got = f"with text_length {facts.inputs.text_length}"
            yield got, f"the student's, {own.text_length}, or more", "lower the student's, or take another teacher"


@dataclass(frozen=True)
class Taught(Objective, Pupil):
    """Base of objectives that learn from the outputs of a finished model.

    Attributes:
        teacher: Folder of a finished run such as ``runs/quickstart``, or one that ``omnivl export`` wrote; null: an
            earlier stage of this run. It is loaded once at the start of the stage and stays as it is. Every process
            that computes losses holds it whole.
        teacher_stage: Stage of the run; null: the newest complete one of the other run.
        soften: Temperature that divides the logits of teacher and student before they are compared. The loss is
            multiplied by its square, so that its gradient stays of one size.
    """

    teacher: str | None = None
    teacher_stage: str | None = None
    soften: float = 1.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.soften > 0.0, "soften", "above 0")

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """No teacher."""
        if not self.names_teacher:
            allowed = "the folder of a finished run or of an exported model, or null beside a teacher_stage of this run"
            yield Misfit(("teacher",), "null" if self.teacher is None else "''", allowed, "name one")

    @property
    def pupils(self) -> tuple[Pupil, ...]:
        """Itself."""
        return (self,)
