"""Grounding: boxes of referring expressions and of phrases, and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.ranges import Range
from omnivl.data.decode import decode_mask
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.placement import Placement
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.locate import Locate
from omnivl.objectives.region import Region, coverage
from omnivl.objectives.segment import Segment
from omnivl.tasks.drawn import with_boxes, with_masks
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import Score, mean_score
from omnivl.tasks.sample_fields import box_of, picture_of, places_by
from omnivl.tasks.scorers.boxes import iou, is_right
from omnivl.tasks.scorers.masks import THRESHOLDS, ious, mask_scores, overlap

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class ExpressionTask(PredictingTask):
    """Base of tasks that ask for one thing in a picture by each of a sample's texts, which all name it.

    Each text counts, as in published figures; ``max_samples`` bounds the samples. Intervals are drawn by picture.
    """

    reads: ClassVar[Reads] = "media"
    right_means: ClassVar[str] = "an intersection over union (IoU) of 0.5 or more"

    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 1024

    def picture_set(self, encoder: Encoder) -> PictureSet:
        """See ``Task``: a sample for each text."""
        return super().picture_set(encoder).by_caption()

    def unjudged(self, encoder: Encoder) -> PictureSet:
        """See ``PredictingTask``: a sample for each text."""
        return super().unjudged(encoder).by_caption()

    def mean(self, pictures: PictureSet, metric: str, values: NDArray[Any], chance: float | None = None) -> Score:
        """The mean of the values of all expressions."""
        owners = [picture_of(sample) for sample in pictures.samples]
        return mean_score(self.name, metric, values, chance=chance, clusters=owners)


@dataclass(frozen=True)
class GroundingTask(ExpressionTask):
    """Share of expressions whose box is found with an intersection over union of 0.5 or more.

    An objective of kind ``locate`` predicts the box; one of kind ``region`` chooses it among the sample's candidates.
    Chance is that of a random candidate, where samples have candidates.

    Attributes:
        objective: Key of the objective.
        source: As for every task; ``scenes`` has generated expressions.
        box: Field of the samples' JSON with the box, [left, top, right, bottom] as fractions.
        candidates: Field with the boxes of all things in the picture.
        by: Field by whose values accuracy is reported as well; null for none.
    """

    kind: Literal["grounding"] = "grounding"
    objective: str = "locate"
    box: str = "box"
    candidates: str = "candidates"
    by: str | None = None

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that locates or chooses."""
        return (Chooses(self.objective, (Locate, Region)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy at IoU 0.5", "accuracy at IoU 0.5, *", "mean IoU")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("box",)

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``box`` in the whole picture, ``[4]``: left, top, right, bottom as fractions."""
        found = encoder.predict(self.objective, pictures, pictures.captions)
        chooses = isinstance(encoder.chain.objectives[self.objective], Region)
        return [{"box": self._found(pictures, i, one, chooses=chooses)} for i, one in enumerate(found)]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[list[float]]:
        """See ``PredictingTask``: the right boxes."""
        return [box_of(sample, self.box) for sample in pictures.samples]

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[list[float]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; each has its ``iou``, and is right with 0.5 or more."""
        wanted, found = np.array(truth), np.array([one["box"] for one in predicted])
        each, hits = iou(found, wanted), is_right(found, wanted)
        scores = [
            self.mean(pictures, "accuracy at IoU 0.5", hits, self._chance(pictures, wanted)),
            self.mean(pictures, "mean IoU", each),
        ]
        if self.by is not None:
            for name, places in places_by(pictures.samples, self.by).items():
                scores.append(self.mean(pictures.chosen(places), f"accuracy at IoU 0.5, {name}", hits[places]))
        own = [{"iou": value, "right": hit} for value, hit in zip(each.tolist(), hits.tolist(), strict=True)]
        return Judged(tuple(scores), own)

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: list[float], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: both boxes."""
        drawn = with_boxes(pictures, place, [np.array(truth)], [found["box"]])
        return Told("", "", f"IoU {own['iou']:.2f}", drawn, "boxes")

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a text and a box."""
        _ = pictures.captions
        for sample in pictures.samples:
            box_of(sample, self.box)

    def _candidates(self, pictures: PictureSet, place: int) -> Boxes | None:
        """The boxes of a sample's candidates ``[K, 4]``; None if it has none."""
        found = pictures.samples[place].meta.get(self.candidates)
        return np.array(found, dtype=np.float64) if isinstance(found, list) and found else None

    def _found(self, pictures: PictureSet, place: int, predicted: Tensor, *, chooses: bool) -> Boxes:
        """The box in the whole picture, of which the model's view may be a part.

        Args:
            pictures: The samples.
            place: Of the sample.
            predicted: A box ``[4]`` in the view, or the scores of its patches.
            chooses: Whether the candidate is taken whose patches have the highest mean score.

        Raises:
            DataError: The sample has none.
        """
        view = pictures.placement(place)
        if not chooses:
            whole, _ = view.inverse().boxes(predicted.double().numpy()[None])
            return np.asarray(whole[0])
        boxes = self._candidates(pictures, place)
        if boxes is None:
            raise DataError(
                f"{pictures.samples[place].where} has no list {self.candidates!r} of boxes to choose from; name "
                "another field in 'candidates'"
            )
        side = round(len(predicted) ** 0.5)
        shown, present = view.boxes(boxes)
        covered = coverage(torch.from_numpy(shown).float(), side, side).flatten(1)
        means = (covered * predicted).sum(1) / covered.sum(1).clamp(min=1e-12)
        return boxes[int(torch.where(torch.from_numpy(present), means, -torch.inf).argmax())]  # type: ignore[no-any-return]

    def _chance(self, pictures: PictureSet, wanted: Boxes) -> float | None:
        """The share of hits of a random candidate; None if a sample has none."""
        hits = []
        for place in range(len(pictures)):
            boxes = self._candidates(pictures, place)
            if boxes is None:
                return None
            hits.append(float(is_right(boxes, wanted[place]).mean()))
        return sum(hits) / len(hits)


@dataclass(frozen=True)
class SegmentationTask(ExpressionTask):
    """Masks of referring expressions: mean and overall intersection over union, and precision at thresholds.

    Attributes:
        objective: Key of the objective, of kind ``segment``.
        source: As for every task; ``scenes`` has generated expressions.
        mask: File of a sample that is its mask, black outside.
    """

    kind: Literal["segmentation"] = "segmentation"
    objective: str = "segment"
    mask: str = "mask.png"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that segments."""
        return (Chooses(self.objective, (Segment,)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("mIoU", "oIoU", "P@*")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("mask",)

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``mask`` of the whole picture, scaled to bool ``[S, S]``."""
        scores = encoder.predict(self.objective, pictures, pictures.captions)
        return [
            {"mask": pictures.placement(i).inverse().mask((one > 0).numpy(), pictures.side)}
            for i, one in enumerate(scores)
        ]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[NDArray[np.bool_]]:
        """See ``PredictingTask``: the right masks."""
        return [self._mask(pictures, place) for place in range(len(pictures))]

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[NDArray[np.bool_]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; each has its ``iou``, and is right with 0.5 or more."""
        counted = [overlap(one["mask"], right) for one, right in zip(predicted, truth, strict=True)]
        shared, either = np.array(counted, dtype=np.int64).T
        each = ious(shared, either)
        scores = (
            self.mean(pictures, "mIoU", each),
            Score(self.name, "oIoU", mask_scores(shared, either)["oIoU"], None, None, len(each)),
            *(self.mean(pictures, f"P@{threshold}", each >= threshold) for threshold in THRESHOLDS),
        )
        return Judged(scores, [{"iou": value, "right": value >= 0.5} for value in each.tolist()])

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: NDArray[np.bool_], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: both masks."""
        drawn = with_masks(pictures, place, truth, found["mask"])
        return Told("", "", f"IoU {own['iou']:.2f}", drawn, "masks")

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a text and a mask."""
        _ = pictures.captions
        for place in range(len(pictures)):
            self._mask(pictures, place)

    def _mask(self, pictures: PictureSet, place: int) -> NDArray[np.bool_]:
        """The mask of the whole picture, scaled to bool ``[S, S]``.

        Raises:
            DataError: The sample has none.
        """
        sample = pictures.samples[place]
        if self.mask not in sample.members:
            raise DataError(f"{sample.where} has no file {self.mask!r}; name the mask's file in 'mask'")
        whole = decode_mask(sample, self.mask, sample.media, DEFAULT_LIMITS)
        return Placement().mask(whole, pictures.side)
