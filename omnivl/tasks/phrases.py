"""Phrase grounding: the boxes of the phrases of a sentence."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.locate import Locate
from omnivl.tasks.drawn import with_boxes
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.pairs import predict_pairs
from omnivl.tasks.results import Gallery, GalleryRow, TaskResult, mean_score
from omnivl.tasks.sample_fields import phrases_of
from omnivl.tasks.scorers.boxes import phrase_ranks
from omnivl.tasks.task import Task

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class _Phrase:
    """A phrase of a sample: the sample's place, and the phrase's boxes ``[M, 4]``, M at least 1."""

    place: int
    text: str
    boxes: Boxes


@dataclass(frozen=True)
class PhrasesTask(Task):
    """Share of phrases whose box is found with an intersection over union of 0.5 or more, by both protocols.

    An objective of kind ``locate`` predicts one box for each phrase, which is a text of its own beside the picture:
    the sentence around it is not read. Of a phrase with several boxes, *any-box* asks for one of them, *merged-box* for
    the smallest box around all; figures of the two do not compare. Phrases without a box are not scored.

    Attributes:
        objective: Key of the objective.
        source: As for every task; ``scenes`` with ``where: {task: [phrases]}`` has generated phrases.
        phrases: Field of the samples' JSON with the phrases, a list of texts.
        boxes: Field with a list of boxes for each phrase, each [left, top, right, bottom] as fractions.
        gallery: Number of phrases to keep for the report: right boxes green, the one found red.
    """

    reads: ClassVar[Reads] = "media"

    kind: Literal["phrases"] = "phrases"
    objective: str = "locate"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 1024
    phrases: str = "phrases"
    boxes: str = "phrase_boxes"
    gallery: Annotated[int, Range(0)] = 12

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that locates."""
        return (Chooses(self.objective, (Locate,)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("any-box R@1", "merged-box R@1")

    def run(self, encoder: Encoder) -> TaskResult:
        """Finds the box of every phrase.

        Raises:
            DataError: A sample lacks what the task reads, or no phrase has a box.
        """
        pictures = self.picture_set(encoder)
        phrases = self._phrases(pictures)
        if not phrases:
            raise DataError(f"task {self.name}: no phrase of {len(pictures)} samples has a box; filter with `where`")
        shown, said = torch.tensor([one.place for one in phrases]), torch.arange(len(phrases))
        predicted = predict_pairs(encoder, self.objective, pictures, [one.text for one in phrases], shown, said)
        views = {place: pictures.placement(place).inverse() for place in {one.place for one in phrases}}
        found = [
            views[phrase.place].boxes(box.double().numpy()[None])[0]  # in the whole picture, not the model's view
            for phrase, box in zip(phrases, predicted, strict=True)
        ]
        hits, merged = (phrase_ranks(found, [one.boxes for one in phrases], merge) <= 1 for merge in (False, True))
        owners = [pictures.samples[one.place].identity or pictures.samples[one.place].key for one in phrases]
        scores = (
            mean_score(self.name, "any-box R@1", hits, clusters=owners),
            mean_score(self.name, "merged-box R@1", merged, clusters=owners),
        )
        return TaskResult(scores, self._gallery(pictures, phrases, found, hits))

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has phrases, and a list of boxes for each."""
        self._phrases(pictures)

    def _phrases(self, pictures: PictureSet) -> list[_Phrase]:
        """The phrases that have boxes."""
        return [
            _Phrase(place, text, np.array(boxes, dtype=np.float64))
            for place, sample in enumerate(pictures.samples)
            for text, boxes in phrases_of(sample, self.phrases, self.boxes)
            if boxes
        ]

    def _gallery(
        self, pictures: PictureSet, phrases: list[_Phrase], found: list[Boxes], hits: NDArray[np.bool_]
    ) -> tuple[Gallery, ...]:
        count = len(phrases)
        rows = []
        for i in (number * count // self.gallery for number in range(min(self.gallery, count))):
            place = phrases[i].place
            right, drawn = (
                with_boxes(pictures, place, list(phrases[i].boxes), "right"),
                with_boxes(pictures, place, list(found[i]), "found"),
            )
            rows.append(GalleryRow(phrases[i].text, right, ("",), (drawn,), (bool(hits[i]),)))
        return (Gallery(f"{self.name}: boxes", tuple(rows)),) if rows else ()
