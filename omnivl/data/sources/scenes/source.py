"""The source ``scenes``: samples of one task about generated scenes or clips.

Nothing is stored. A sample is a pure function of (seed, part, task, index).

Shapes: T frames, S side of a picture in pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from omnivl.data.batch import Visual, visual_of
from omnivl.data.config import DataEntryConfig
from omnivl.data.fields import texts_in
from omnivl.data.sources.base import Rejection, Sample
from omnivl.data.sources.generated import GENERATED, check_kind, chosen, drawings_of
from omnivl.data.sources.motion_poses import MIN_FRAMES
from omnivl.data.sources.motion_sprites import Sprite
from omnivl.data.sources.scenes import captions as describing
from omnivl.data.sources.scenes import choices, clips, documents, expressions, questions, statements
from omnivl.data.sources.scenes.cast import PARTS, Cast
from omnivl.data.sources.scenes.clips import ClipMaker, draw_clip
from omnivl.data.sources.scenes.made import Maker, Numbers
from omnivl.data.sources.scenes.picture import Picture, as_png, draw
from omnivl.data.sources.scenes.sentiment import Faces
from omnivl.data.text import may_flip
from omnivl.errors import DataError
from omnivl.randomness import generator

DEFAULT_LENGTH = 100_000
LEAST_SIDE = 96
"""Smallest side of a drawn picture: a small thing has 18 pixels then."""

MASK = "mask.png"
SIDES = ("left.png", "right.png")
HIDES = ("picture", "text")
HIDDEN_TEXT = "?"

_MAKERS: Mapping[str, Maker] = {
    "captions": describing.captions,
    "paragraphs": describing.paragraphs,
    "phrases": describing.phrases,
    "entailment": statements.entailment,
    "pairs": statements.pairs,
    "expressions": expressions.expression,
    "reasons": choices.reasons,
    "dialogue": choices.dialogue,
}
_CLIP_MAKERS: Mapping[str, tuple[ClipMaker, tuple[str, ...]]] = {
    "clip_questions": (clips.clip_question, clips.QUESTION_TYPES),
    "clip_statements": (clips.clip_statement, clips.STATEMENT_TYPES),
    "clip_captions": (clips.clip_caption, clips.STATEMENT_TYPES),
}
TASKS: Mapping[str, Visual] = {
    "questions": "image",
    **{name: "set" if name == "pairs" else "image" for name in _MAKERS},
    "documents": "set",
    **dict.fromkeys(_CLIP_MAKERS, "clip"),
    "sentiment": "clip",
}
"""What the samples of each task show."""

_TYPES: Mapping[str, tuple[str, ...]] = {
    "questions": tuple(questions.TYPES),
    **{name: types for name, (_, types) in _CLIP_MAKERS.items()},
}
"""Types of a task's questions or statements."""

_DEFAULT_TASKS: Mapping[Visual, str] = {"image": "questions", "set": "pairs", "clip": "clip_questions"}


class SceneSource:
    """A source of generated scenes.

    ``where`` says which:

    - ``task: [entailment]``: one of ``TASKS``; by default questions about pictures, pairs or clips, as the kind says;
    - ``question_type: [count, what]``: types of questions or statements, all equally frequent; by default all;
    - ``shots: [4]``: the number of things that a document names, 1 to 8; by default 4;
    - ``called: [own]``: a document calls them by their own names instead of made-up ones (``made_up``, the default);
    - ``wording: [brief]``: a document says ``dra. lun. what?`` instead of whole ``sentences`` (the default);
    - ``part: [test]``: another endless supply of samples: ``train`` (the default), ``val``, ``test``; ``pairs``, whose
      two main things never stood together in training; ``concepts``, whose main thing (in documents: each thing) was in
      no scene of training;
    - ``hide: [picture]`` or ``[text]``: the same samples in black, or without their text, for baselines that must not
      know it;
    - anything else filters the drawings by their metadata (``style``, ``label``, ``group`` ...).

    The fields of samples are those that tasks on public data have; see ``docs/data.md``.
    """

    def __init__(
        self,
        config: DataEntryConfig,
        *,
        seed: int,
        num_frames: int = MIN_FRAMES,
        size: int = LEAST_SIDE,
        length: int = DEFAULT_LENGTH,
    ) -> None:
        """Opens the drawings.

        Args:
            config: Kind and ``where`` are used.
            seed: Seed of the samples.
            num_frames: T of clips, at least; they have ``MIN_FRAMES`` or more.
            size: S, at least; it is ``LEAST_SIDE`` or more, in documents half of that.
            length: Number of samples.

        Raises:
            DataError: The kind does not fit the task, ``where`` names something unknown, or it leaves too few drawings.
        """
        default = _DEFAULT_TASKS.get(visual_of(config.kind), "questions")
        (self._part,) = chosen(config, "part", PARTS, PARTS[:1])
        (self._task,) = chosen(config, "task", tuple(TASKS), (default,))
        types = _TYPES.get(self._task, ())
        self._types = chosen(config, "question_type", types, types, several=True)
        (shots,) = chosen(config, "shots", tuple(map(str, documents.SHOTS)), (str(documents.DEFAULT_SHOTS),))
        self._shots = int(shots)
        self._hides = next(iter(chosen(config, "hide", HIDES, ())), None)
        fitting = [kind for kind in GENERATED["scenes"] if visual_of(kind) == TASKS[self._task]]
        check_kind(config, fitting, f" for task {self._task!r}")
        (self._called,) = chosen(config, "called", documents.CALLED, documents.CALLED[:1])
        (self._wording,) = chosen(config, "wording", documents.WORDINGS, documents.WORDINGS[:1])
        for name in ("shots", "called", "wording"):
            if config.where.get(name) and self._task != "documents":
                raise DataError(
                    f"data source 'scenes': where.{name} is of task 'documents', got {self._task!r}; remove it"
                )
        if self._task == "documents" and self._part == "pairs":
            raise DataError(
                "data source 'scenes': where.part is 'pairs'; allowed for task 'documents', whose things never stand "
                "together: train, val, test, concepts; change it"
            )
        where = drawings_of(config, ("part", "task", "question_type", "shots", "called", "wording", "hide"))
        self._seed, self._length = seed, length
        least = documents.LEAST_SIDE if self._task == "documents" else LEAST_SIDE
        self._size, self._num_frames = max(size, least), max(num_frames, MIN_FRAMES)
        self._faces = Faces(where) if self._task == "sentiment" else None
        self._cast = None if self._faces is not None else Cast(where, self._part)

    @property
    def classes(self) -> tuple[str, ...]:
        """None: the samples have answers, not classes."""
        return ()

    @property
    def rejections(self) -> Sequence[Rejection]:
        """None: generated samples are never bad."""
        return ()

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """Draws the sample at ``index``."""
        random = generator(self._seed, "scenes", self._part, self._task, index)
        key = f"{self._task}-{self._part}-{index:08d}"
        found = self._clip(random) if TASKS[self._task] == "clip" else self._picture(random)
        sample = Sample(
            key=key,
            where=f"scenes:{self._seed}:{key}",
            frames=found.frames,
            captions=found.captions,
            identity=key,
            meta={
                **found.fields,
                "task": self._task,
                "part": self._part,
                "question_id": index,
                "flip": all(may_flip(text) for text in (*found.captions, *texts_in(found.fields))),
            },
            members=found.members,
        )
        return sample if self._hides is None else _hidden(sample, self._hides)

    def answers(self) -> tuple[str, ...]:
        """All answers that the samples of the task can have, each once: for the list of an objective that chooses."""
        cast = self._cast
        assert cast is not None, "a sentiment is no answer"
        if self._task == "questions":
            found = [answer for kind in self._types for answer in questions.answers_of(kind, cast)]
        elif self._task == "clip_questions":
            found = [*(clips.ACTIONS if "does" in self._types else ()), *cast.names]
        elif self._task == "documents":
            found = list(cast.names if self._called == documents.OWN else documents.NAMES)
        elif self._task == "entailment":
            found = list(statements.ENTAILMENT)
        else:
            found = list(statements.TRUTH)
        return tuple(dict.fromkeys(found))

    def _picture(self, random: np.random.Generator) -> "_Drawn":
        assert self._cast is not None
        if self._task == "questions":
            made = questions.question(random, self._cast, self._types)
        elif self._task == "documents":
            made = documents.document(random, self._cast, self._shots, self._called, self._wording)
        else:
            made = _MAKERS[self._task](random, self._cast)
        pictures = [draw(scene, self._cast.sprite, self._size) for scene in made.scenes]
        fields = {**made.fields, **{name: _boxes(pictures[0], numbers) for name, numbers in made.boxes.items()}}
        if len(pictures) > 1:
            names = documents.files_of(self._shots) if self._task == "documents" else SIDES
            members = {name: as_png(one.pixels) for name, one in zip(names, pictures, strict=True)}
            return _Drawn(None, made.captions, fields, members)
        members = {} if made.mask is None else {MASK: as_png(pictures[0].masks[made.mask])}
        return _Drawn(pictures[0].pixels[None], made.captions, fields, members)

    def _clip(self, random: np.random.Generator) -> "_Drawn":
        sprite: Callable[[int], Sprite]
        if self._faces is not None:
            clip, sprite = self._faces.clip(random, self._num_frames), self._faces.sprite
        else:
            assert self._cast is not None
            make, _ = _CLIP_MAKERS[self._task]
            clip, sprite = make(random, self._cast, self._num_frames, self._types), self._cast.sprite
        return _Drawn(draw_clip(clip, sprite, self._size), clip.captions, clip.fields, {})


@dataclass(frozen=True)
class _Drawn:
    """The drawn parts of a sample."""

    frames: NDArray[np.uint8] | None
    captions: tuple[str, ...]
    fields: Mapping[str, object]
    members: Mapping[str, bytes]


def _boxes(picture: Picture, numbers: Numbers) -> object:
    """The boxes of things, nested as their indices are."""
    if isinstance(numbers, int):
        return picture.box(numbers)
    return [_boxes(picture, one) for one in numbers]


def _hidden(sample: Sample, what: str) -> Sample:
    """A sample in black, or with a text that says nothing."""
    if what == "text":
        meta = {**sample.meta, **{name: HIDDEN_TEXT for name in ("question", "statement") if name in sample.meta}}
        return replace(sample, captions=(HIDDEN_TEXT,), meta=meta)
    frames = None if sample.frames is None else np.zeros_like(sample.frames)
    size = LEAST_SIDE
    black = as_png(np.zeros((size, size, 3), dtype=np.uint8))
    members = {name: media if name == MASK else black for name, media in sample.members.items()}
    return replace(sample, frames=frames, members=members)
