"""Grounded captions: whether a written caption puts the things that it names where they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from omnivl.data.sources.scenes.words import singular
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.locate import Locate
from omnivl.tasks.captions import STOP_WORDS, WritingTask
from omnivl.tasks.drawn import with_boxes
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.pairs import located
from omnivl.tasks.predicting import Judged, Line
from omnivl.tasks.results import Score
from omnivl.tasks.sample_fields import Phrase, phrases_of, picture_of
from omnivl.tasks.scorers.boxes import merged
from omnivl.tasks.scorers.grounded import GroundedCaption, GroundedReference, grounded_scores, placed
from omnivl.tasks.spelling import comparable

_ARTICLES = frozenset({"a", "an", "the"})
_PLACING = frozenset(
    {"at", "by", "for", "from", "near", "next", "behind", "beside", "under", "below", "over", "above", "between"}
    | {"through", "into", "onto", "off", "up", "down", "out"}
)
_NO_THINGS = STOP_WORDS | _PLACING | {"is", "are", "as", "or", "while", "that", "which", "who"}
"""Words that name nothing, and at which what is said of a thing begins anew."""


@dataclass(frozen=True)
class GroundedCaptionsTask(WritingTask):
    """F1 of the things that captions name at the right place, as means over classes of things: F1_all and F1_loc.

    A head that writes captions writes one for each picture; of each of its words that may name a thing, one of kind
    ``locate`` predicts the box, from the words that lead to it: ``a black dog``. F1_all counts against a caption what
    it names and the picture's sentences do not, and what these name and it does not; F1_loc is of what both name.
    Samples of one picture (of one ``identity``) are its sentences.

    Attributes:
        locates: Key of the objective that predicts boxes.
        source: As for every task; ``scenes`` with ``where: {task: [phrases]}`` has generated sentences with phrases.
        phrases: Field of the samples' JSON with the phrases of the sentence, a list of texts.
        boxes: Field with a list of boxes for each phrase, each [left, top, right, bottom] as fractions. Of several the
            smallest box around them counts.
        classes: Names of the classes of things: a list, or the path of a text file with a name on each line; without
            them the last word of every phrase that has a box is a class. A plural names the class of its singular.
    """

    reads: ClassVar[Reads] = "caption"
    lists: ClassVar[tuple[str, ...]] = ("classes",)
    right_means: ClassVar[str] = (
        "caption and sentence both name a thing, and all that both name have boxes with an intersection over union "
        "(IoU) above 0.5"
    )

    kind: Literal["grounded_captions"] = "grounded_captions"
    source: str = "scenes"
    locates: str = "locate"
    phrases: str = "phrases"
    boxes: str = "phrase_boxes"
    classes: str | tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[Need, ...]:
        """The heads that write and that locate."""
        return (*super().needs, Chooses(self.locates, (Locate,)))

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return tuple(f"{figure}_{mode}" for mode in ("all", "loc") for figure in ("F1", "precision", "recall"))

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("caption", "words", "boxes")

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``caption``, those of its ``words`` that may name a thing, and their ``boxes``.

        Boxes are ``[P, 4]`` in the whole picture: left, top, right, bottom as fractions. Samples of one picture have
        one caption.
        """
        first: dict[str, int] = {}
        for place, sample in enumerate(pictures.samples):
            first.setdefault(picture_of(sample), place)
        shown = pictures.chosen(list(first.values()))
        captions = self.written(shown, encoder)
        words = [comparable(caption).split() for caption in captions]
        boxes = located(
            encoder, self.locates, shown, [[_said_of(own, place) for place in _things(own)] for own in words]
        )
        lines = {
            picture: {"caption": caption, "words": [own[place] for place in _things(own)], "boxes": found}
            for picture, caption, own, found in zip(first, captions, words, boxes, strict=True)
        }
        return [lines[picture_of(sample)] for sample in pictures.samples]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[list[Phrase]]:
        """See ``PredictingTask``: the phrases of each sample with their boxes.

        Raises:
            DataError: None of them has both a box and a class.
        """
        found = [phrases_of(sample, self.phrases, self.boxes) for sample in pictures.samples]
        names = self._names(found)
        if not any(boxes and names.of(phrase) is not None for own in found for phrase, boxes in own):
            raise DataError(
                f"task {self.name}: no phrase of {len(pictures)} samples that names a class has a box; filter with "
                "`where`, or change 'classes'"
            )
        return found

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[list[Phrase]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; a sample is right if all things that both sides name are at the right place."""
        names = self._names(truth)
        sentences: dict[str, list[GroundedReference]] = {}
        written: dict[str, GroundedCaption] = {}
        each: list[Line] = []
        for place, (line, own) in enumerate(zip(predicted, truth, strict=True)):
            pixels = np.tile(pictures.size(place), 2)
            picture = picture_of(pictures.samples[place])
            written[picture] = _caption(line, names, pixels)
            sentence = _sentence(pictures.captions[place], own, names, pixels)
            sentences.setdefault(picture, []).append(sentence)
            both = [right for _, right in placed(sentence, written[picture])]
            each.append({"right": bool(both) and all(both), "named": len(both), "placed": sum(both)})
        scores = grounded_scores(sentences, written)
        found = tuple(Score(self.name, figure, scores[figure], None, None, len(written)) for figure in self.figures)
        return Judged(found, each)

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: list[Phrase], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: the boxes of the sentence's phrases, and those of the caption's words."""
        right = [np.array(box) for _, boxes in truth for box in boxes]
        drawn = with_boxes(pictures, place, right, list(found["boxes"]))
        measure = f"{own['placed']} of {own['named']} things that both name in place"
        return Told(found["caption"] or "(nothing)", pictures.captions[place], measure, drawn, "boxes")

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a sentence and phrases, and a list of boxes for each."""
        _ = pictures.captions
        for sample in pictures.samples:
            phrases_of(sample, self.phrases, self.boxes)

    def _names(self, phrases: Sequence[Sequence[Phrase]]) -> "_Names":
        """The names of the classes."""
        if self.classes:
            return _Names(self.classes)
        every = [comparable(phrase).split() for own in phrases for phrase, boxes in own if boxes]
        return _Names([words[_things(words)[-1]] for words in every if _things(words)])


class _Names:
    """Names of classes, of one or several words, found in texts."""

    def __init__(self, names: Sequence[str]) -> None:
        self._classes: Mapping[tuple[str, ...], str] = {words: " ".join(words) for words in map(_base, names)}
        self._longest = max(map(len, self._classes), default=0)

    def at(self, words: Sequence[str], place: int) -> str | None:
        """The class that is named by the words up to a place, the longest such name; None if there is none."""
        for count in range(min(self._longest, place + 1), 0, -1):
            found = self._classes.get(_base(" ".join(words[place + 1 - count : place + 1])))
            if found is not None:
                return found
        return None

    def of(self, phrase: str) -> str | None:
        """The class of what a phrase names, by its last word that may name a thing."""
        words = comparable(phrase).split()
        places = _things(words)
        return self.at(words, places[-1]) if places else None

    def in_text(self, text: str) -> Iterator[str]:
        """The classes that a text names."""
        words = comparable(text).split()
        yield from (name for place in _things(words) if (name := self.at(words, place)) is not None)


def _base(name: str) -> tuple[str, ...]:
    """The words of a name, the last of them in the singular."""
    *others, last = comparable(name).split()
    return (*others, singular(last))


def _things(words: Sequence[str]) -> list[int]:
    """The places of words that may name a thing."""
    return [place for place, word in enumerate(words) if word[0].isalnum() and word not in _NO_THINGS]


def _said_of(words: Sequence[str], place: int) -> str:
    """A word with those that lead to it, from the last one on that names nothing: its article, else the next one."""
    first = place
    while first > 0 and words[first - 1][0].isalnum() and words[first - 1] not in _NO_THINGS:
        first -= 1
    if first > 0 and words[first - 1] in _ARTICLES:
        first -= 1
    return " ".join(words[first : place + 1])


def _caption(line: Line, names: _Names, pixels: NDArray[np.int64]) -> GroundedCaption:
    """What a caption names, with its boxes in pixels."""
    words = comparable(line["caption"]).split()
    found = zip(_things(words), line["boxes"], strict=True)
    named = [(name, (box * pixels).tolist()) for place, box in found if (name := names.at(words, place)) is not None]
    return GroundedCaption(tuple(name for name, _ in named), tuple(box for _, box in named))


def _sentence(text: str, phrases: Sequence[Phrase], names: _Names, pixels: NDArray[np.int64]) -> GroundedReference:
    """What a sentence names, with the boxes around it in pixels, and what it names without a box."""
    named = [
        (name, (merged(boxes)[0] * pixels).tolist())
        for phrase, boxes in phrases
        if boxes and (name := names.of(phrase)) is not None
    ]
    classes = tuple(name for name, _ in named)
    return GroundedReference(classes, tuple(box for _, box in named), frozenset(names.in_text(text)) - set(classes))
