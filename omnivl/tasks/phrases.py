"""Phrase grounding: the boxes of the phrases of a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import patch_attention
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.locate import Locate
from omnivl.tasks.drawn import with_boxes
from omnivl.tasks.examples import Told, example_gallery
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.pairs import located
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import Gallery, evenly, mean_score
from omnivl.tasks.sample_fields import phrases_of, picture_of, texts_of
from omnivl.tasks.scorers.boxes import iou, phrase_ranks

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class _Phrase:
    """A phrase of a sample: the sample's place, its own number there, and its boxes ``[M, 4]``, M at least 1."""

    place: int
    number: int
    text: str
    boxes: Boxes


@dataclass(frozen=True)
class PhrasesTask(PredictingTask):
    """Share of phrases whose box is found with an intersection over union of 0.5 or more, by both protocols.

    An objective of kind ``locate`` predicts one box for each phrase, which is a text of its own beside the picture:
    the sentence around it is not read. Of a phrase with several boxes, *any-box* asks for one of them, *merged-box* for
    the smallest box around all; figures of the two do not compare. Phrases without a box are not scored.

    Attributes:
        objective: Key of the objective.
        source: As for every task; ``scenes`` with ``where: {task: [phrases]}`` has generated phrases.
        phrases: Field of the samples' JSON with the phrases, a list of texts.
        boxes: Field with a list of boxes for each phrase, each [left, top, right, bottom] as fractions.
        gallery: Number of phrases to show in the report, otherwise as for all tasks.
    """

    reads: ClassVar[Reads] = "media"
    right_means: ClassVar[str] = "an intersection over union (IoU) of 0.5 or more with one of the phrase's boxes"

    kind: Literal["phrases"] = "phrases"
    objective: str = "locate"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 1024
    phrases: str = "phrases"
    boxes: str = "phrase_boxes"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that locates."""
        return (Chooses(self.objective, (Locate,)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("any-box R@1", "merged-box R@1")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("boxes",)

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: ``boxes [P, 4]`` in the whole picture, one for each of the sample's phrases."""
        texts = [texts_of(sample, self.phrases, least=0) for sample in pictures.samples]
        return [{"boxes": boxes} for boxes in located(encoder, self.objective, pictures, texts)]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[list[list[list[float]]]]:
        """See ``PredictingTask``: the boxes of each phrase of each sample, none where it has none.

        Raises:
            DataError: No phrase has a box.
        """
        found = [[boxes for _, boxes in phrases_of(sample, self.phrases, self.boxes)] for sample in pictures.samples]
        if not any(any(own) for own in found):
            raise DataError(f"task {self.name}: no phrase of {len(pictures)} samples has a box; filter with `where`")
        return found

    def judge(self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[Any], encoder: Encoder) -> Judged:
        """See ``PredictingTask``; a sample is right with all of its phrases, by any box."""
        phrases = self._phrases(pictures)
        found = _found(phrases, predicted)
        hits, merged = (phrase_ranks(found, [one.boxes for one in phrases], merge) <= 1 for merge in (False, True))
        owners = [picture_of(pictures.samples[one.place]) for one in phrases]
        scores = (
            mean_score(self.name, "any-box R@1", hits, clusters=owners),
            mean_score(self.name, "merged-box R@1", merged, clusters=owners),
        )
        right = np.ones(len(pictures), dtype=np.bool_)
        np.logical_and.at(right, [one.place for one in phrases], hits)
        return Judged(scores, [{"right": one} for one in right])

    def galleries(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[Any], judged: Judged, encoder: Encoder
    ) -> tuple[Gallery, ...]:
        """See ``PredictingTask``: of phrases, not of samples."""
        phrases = self._phrases(pictures)
        found, places = _found(phrases, predicted), evenly(len(phrases), self.gallery)
        right = (phrase_ranks(found, [one.boxes for one in phrases], False) <= 1).tolist()
        told = []
        for one, box in ((phrases[place], found[place][0]) for place in places):
            drawn = with_boxes(pictures, one.place, list(one.boxes), [box])
            told.append(Told("", "", f"IoU {iou(box[None], one.boxes).max():.2f}", drawn, "boxes"))
        asked, owners = [phrases[place].text for place in places], [one.place for one in phrases]
        seen = patch_attention(encoder, self.objective, pictures.chosen([owners[place] for place in places]), asked)
        return example_gallery(self, pictures, places, asked, told, right, seen, owners)

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has phrases, and a list of boxes for each."""
        self._phrases(pictures)

    def _phrases(self, pictures: PictureSet) -> list[_Phrase]:
        """The phrases that have boxes."""
        return [
            _Phrase(place, number, text, np.array(boxes, dtype=np.float64))
            for place, sample in enumerate(pictures.samples)
            for number, (text, boxes) in enumerate(phrases_of(sample, self.phrases, self.boxes))
            if boxes
        ]


def _found(phrases: Sequence[_Phrase], predicted: Sequence[Line]) -> list[Boxes]:
    """The box predicted for each phrase, ``[1, 4]``."""
    return [predicted[one.place]["boxes"][one.number : one.number + 1] for one in phrases]
