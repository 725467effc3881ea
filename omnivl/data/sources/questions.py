"""Generated questions about the embedded drawings: what one is called, of what kind it is, whether it is a given one.

Nothing is stored. A question is a pure function of (seed, part, index). Of a drawing its name, its tags, its group and
its subgroup are known, and that is what is asked for:

- ``name``: the drawing's name. Where one of its tags belongs to no other drawing, some of the ten people who are
  thought to have answered give that tag instead, so that several answers are right with different weights;
- ``kind``: its subgroup, such as ``food fruit``;
- ``category``: its group, such as ``food & drink``;
- ``check``: whether it is a drawing of a given name: yes and no equally often, and the names in both asked for alike.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.base import Rejection, Sample
from omnivl.data.sources.emoji import open_emoji
from omnivl.data.sources.generated import PARTS, check_kind, chosen, drawings_of
from omnivl.data.text import may_flip
from omnivl.errors import DataError
from omnivl.randomness import generator, stable_hash

DEFAULT_LENGTH = 100_000
ANNOTATORS = 10
"""People who are thought to have answered each question, as in VQA."""

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "name": ("what is this?", "what is shown here?"),
    "kind": ("what kind of thing is this?", "which kind is it?"),
    "category": ("which category is this?", "what category does it belong to?"),
    "check": ("is this {name}?", "does it show {name}?"),
}
_MAX_ATTEMPTS = 100


class QuestionSource:
    """A source of generated questions, of kind ``image_text``; a sample's text is its question.

    ``where`` filters the drawings by their metadata (``style``, ``split``, ``group``, ``label`` ...);
    ``where: {part: [test]}`` takes another endless supply of questions (``train``, the default, ``val`` or ``test``),
    ``where: {question_type: [name, check]}`` asks such questions only, all of them equally often.

    The fields of a sample: ``question``, ``question_type``, ``answers`` (all that are right, that of most people first)
    and ``weights`` (the share of people who gave each).
    """

    def __init__(self, config: DataEntryConfig, *, seed: int, length: int = DEFAULT_LENGTH) -> None:
        """Opens the drawings.

        Args:
            config: Kind and ``where`` are used.
            seed: Seed of the questions.
            length: Number of questions.

        Raises:
            DataError: The kind is another one, or ``where`` leaves no drawing or names an unknown part or type.
        """
        check_kind(config)
        (self._part,) = chosen(config, "part", PARTS, PARTS[:1])
        self._types = chosen(config, "question_type", tuple(TEMPLATES), tuple(TEMPLATES), several=True)
        where = drawings_of(config, ("part", "question_type"))
        self._drawings = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where=where))
        self._seed, self._length = seed, length

    @property
    def classes(self) -> tuple[str, ...]:
        """None: what is asked for are answers, not classes."""
        return ()

    @property
    def rejections(self) -> Sequence[Rejection]:
        """None: what is embedded is not broken."""
        return ()

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """The question at ``index``.

        Raises:
            BadSampleError: A drawing cannot be read.
        """
        random = generator(self._seed, "questions", self._part, index)
        asked = self._types[int(random.integers(len(self._types)))]
        template = TEMPLATES[asked][int(random.integers(len(TEMPLATES[asked])))]
        drawing = self._drawings.read(int(random.integers(len(self._drawings))))
        if asked == "check":
            is_it = bool(random.integers(2))
            other = drawing if is_it else self._another(random, drawing)
            question, shares = template.format(name=other.meta["name"]), {"yes" if is_it else "no": 1.0}
        else:
            question, shares = template, answers_to(asked, drawing)
        key = f"{self._part}-{index:08d}"
        return replace(
            drawing,
            key=key,
            where=f"questions:{self._seed}:{key}",
            captions=(question,),
            label=None,
            meta={
                **{name: drawing.meta[name] for name in ("name", "style", "split", "group", "hexcode")},
                "kind": drawing.meta["label"],
                "part": self._part,
                "question": question,
                "question_type": asked,
                "answers": list(shares),
                "weights": list(shares.values()),
                "flip": may_flip(str(drawing.meta["name"])),
            },
        )

    def _another(self, random: np.random.Generator, drawing: Sample) -> Sample:
        """A drawing of another concept that no tag makes the same.

        Raises:
            DataError: There is none.
        """
        own = set(answers_to("name", drawing))
        for _ in range(_MAX_ATTEMPTS):
            other = self._drawings.read(int(random.integers(len(self._drawings))))
            if other.meta["name"] not in own:
                return other
        raise DataError(
            f"data source 'questions': {_MAX_ATTEMPTS} drawings were all of {drawing.meta['name']!r}; allow more than "
            f"{len(self._drawings)} drawings in where, or leave 'check' out of where.question_type"
        )


def answers_to(asked: str, drawing: Sample) -> dict[str, float]:
    """The answers to a question of another type than ``check``, with the share of people who gave each.

    Args:
        asked: Type of the question.
        drawing: A sample of the embedded set.
    """
    return _ANSWERS[asked](drawing)


def answer_list(where: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """All answers to questions about the drawings that a filter leaves, each once, in the order of questions' types.

    Args:
        where: As in ``DataEntryConfig``.

    Raises:
        DataError: No drawing is left.
    """
    source = QuestionSource(DataEntryConfig(source="questions", kind="image_text", where=where), seed=0)
    drawings = [source._drawings.read(index) for index in range(len(source._drawings))]
    found: dict[str, None] = {}
    for asked in source._types:
        given = ["yes", "no"] if asked == "check" else [one for own in drawings for one in answers_to(asked, own)]
        found |= dict.fromkeys(sorted(given) if asked != "check" else given)
    return tuple(found)


def _names(drawing: Sample) -> dict[str, float]:
    """The name, and a tag that belongs to no other drawing."""
    name, concept = str(drawing.meta["name"]), str(drawing.identity)
    own = _own_tags().get(concept)
    if own is None:
        return {name: 1.0}
    given = 2 + stable_hash("questions", "synonym", concept) % 3
    return {name: 1.0 - given / ANNOTATORS, own: given / ANNOTATORS}


@cache
def _own_tags() -> dict[str, str]:
    """By concept the first of its tags that is no other concept's tag or name, and none of its own name."""
    drawings = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where={"style": ("noto",)}))
    tags: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for index in range(len(drawings)):
        sample = drawings.read(index)
        concept, kept = str(sample.identity), sample.meta.get("tags", [])
        names[concept] = str(sample.meta["name"])
        tags[concept] = [str(tag) for tag in kept] if isinstance(kept, list) else []
    counts = Counter(tag for own in tags.values() for tag in set(own)) + Counter(names.values())
    found: dict[str, str] = {}
    for concept, own in tags.items():
        unique = [tag for tag in own if counts[tag] == 1]
        if unique:
            found[concept] = unique[0]
    return found


_ANSWERS: Mapping[str, Callable[[Sample], dict[str, float]]] = {
    "name": _names,
    "kind": lambda drawing: {str(drawing.meta["label"]): 1.0},
    "category": lambda drawing: {str(drawing.meta["group"]): 1.0},
}
