"""Tasks that predict something of each sample: what the model is asked, apart from what is right, and a line for each.

A line is what one sample's prediction is written as: where the sample is, its identifiers, the text that the model was
asked about, what was predicted, and in an evaluation what is right.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from moe.ranges import Range
from omnivl.data.sources.base import Sample
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import PatchAttention, patch_attention
from omnivl.inference.pictures import PictureSet
from omnivl.tasks.examples import Told, example_gallery
from omnivl.tasks.results import Gallery, ResultFile, Score, TaskResult, evenly
from omnivl.tasks.scorers.masks import run_lengths
from omnivl.tasks.task import Task

PREDICTIONS = "predictions.jsonl"

Line = Mapping[str, Any]
"""Fields of a sample's line, or some of them: plain values and numpy arrays."""


@dataclass(frozen=True)
class Judged:
    """Predictions compared with the truth.

    Attributes:
        scores: As a task reports them.
        each: Of every sample ``right``, whether its prediction is, and other values of its own that scores are made of.
    """

    scores: tuple[Score, ...]
    each: Sequence[Line]


@dataclass(frozen=True)
class KeepingTask(Task):
    """Base of tasks that can keep what they predict of each sample.

    Attributes:
        predictions: Whether to keep what was predicted of every sample: a line of JSON for each in
            ``predictions.jsonl``, beside the scores.
    """

    predictions: bool = False

    def kept(
        self, pictures: PictureSet, found: Iterable[tuple[Line, Line]], asked: Sequence[str | None] | None = None
    ) -> tuple[ResultFile, ...]:
        """The file of predictions; none where ``predictions`` is false.

        Args:
            pictures: N samples.
            found: Of each what was predicted, and ``truth``, ``right``, and what else an evaluation says of it.
            asked: The text that the model was asked about with each, None where there is none.
        """
        if not self.predictions:
            return ()
        lines = _lines(pictures, [None] * len(pictures) if asked is None else asked, found)
        return (ResultFile(PREDICTIONS, partial(_write, lines)),)


@dataclass(frozen=True)
class PredictingTask(KeepingTask):
    """Base of tasks that predict something of each sample without a look at what is right of any.

    Class attribute: ``right_means``, when a prediction is right, for people.

    Attributes:
        gallery: Number of samples to show in the report with what was predicted of them, right or wrong, evenly spread
            over all samples; 0 for none.
    """

    right_means: ClassVar[str] = "what was given is the sample's own"

    gallery: Annotated[int, Range(0)] = 12

    @property
    @abstractmethod
    def predicts(self) -> tuple[str, ...]:
        """Names of the fields of a prediction."""

    @abstractmethod
    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """What the model says of each sample, without a look at what is right.

        Args:
            pictures: The samples, N of them.
            encoder: As for ``run``.

        Returns:
            Of each sample the fields of ``predicts``, which are kept, and those that only the gallery needs.

        Raises:
            DataError: A sample lacks what the model is asked with.
        """

    @abstractmethod
    def truth(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Any]:
        """What is right for each sample.

        Raises:
            DataError: A sample does not say.
        """

    @abstractmethod
    def judge(self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[Any], encoder: Encoder) -> Judged:
        """Scores the predictions.

        Args:
            pictures: The samples.
            predicted: From ``predict``.
            truth: From ``truth``.
            encoder: As for ``run``.
        """

    def asked(self, pictures: PictureSet) -> Sequence[str | None]:
        """The text that the model is asked about with each sample: its first one, if it has any."""
        return [sample.captions[0] if sample.captions else None for sample in pictures.samples]

    def run(self, encoder: Encoder) -> TaskResult:
        """Predicts and scores; see ``Task``.

        Raises:
            DataError: A sample lacks what the task reads.
        """
        pictures = self.picture_set(encoder)
        asked, truth = self.asked(pictures), self.truth(pictures, encoder)  # before the predictions, which take long
        predicted = self.predict(pictures, encoder)
        judged = self.judge(pictures, predicted, truth, encoder)
        right = ({"truth": one, **own} for one, own in zip(truth, judged.each, strict=True))
        kept = self.kept(pictures, zip(map(self._predicted_fields, predicted), right, strict=True), asked)
        shown = self.galleries(pictures, predicted, truth, judged, encoder) if self.gallery else ()
        return TaskResult(judged.scores, shown, kept)

    def galleries(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[Any], judged: Judged, encoder: Encoder
    ) -> tuple[Gallery, ...]:
        """Some samples for the report, chosen before anything is known of them; arguments as those of ``judge``."""
        places, asked = evenly(len(pictures), self.gallery), self.asked(pictures)
        told = [self.told(pictures, i, predicted[i], truth[i], judged.each[i], encoder) for i in places]
        right = [bool(one["right"]) for one in judged.each]
        texts = [asked[i] or "" for i in places]
        seen = self.attention(pictures, places, predicted, encoder)
        return example_gallery(self, pictures, places, texts, told, right, seen)

    def told(self, pictures: PictureSet, place: int, found: Line, truth: Any, own: Line, encoder: Encoder) -> Told:
        """What the report says of one sample.

        Args:
            pictures: The samples.
            place: Of the sample among them.
            found: What was predicted of it.
            truth: What is right.
            own: What ``judge`` says of it.
            encoder: As for ``run``.
        """
        return Told(str(found[self.predicts[0]]), str(truth), likely(found.get("probability")))

    def attention(
        self, pictures: PictureSet, places: Sequence[int], predicted: Sequence[Line], encoder: Encoder
    ) -> PatchAttention | None:
        """What the texts of some samples attend to in their pictures; None where nothing reads them together.

        By default the text that an objective named by the option ``objective`` is asked about.
        """
        objective, asked = getattr(self, "objective", None), self.asked(pictures)
        texts = [asked[place] or "" for place in places]
        return None if objective is None else patch_attention(encoder, objective, pictures.chosen(places), texts)

    def unjudged(self, encoder: Encoder) -> PictureSet:
        """The samples of the task, also those that lack what is right.

        Raises:
            DataError: There are none, or one of them is bad.
        """
        given = self.media, self.where, encoder.model.inputs, self.max_samples
        return PictureSet(self.source, *given, "media", pictures=self.pictures)

    def lines(self, pictures: PictureSet, encoder: Encoder) -> list[Line]:
        """A line for each sample, without what is right. Called in evaluation mode and without gradients.

        Args:
            pictures: From ``unjudged``.
            encoder: As for ``run``.

        Raises:
            DataError: A sample lacks what the model is asked with.
        """
        asked = self.asked(pictures)
        return _lines(
            pictures, asked, ((self._predicted_fields(found), {}) for found in self.predict(pictures, encoder))
        )

    def _predicted_fields(self, found: Line) -> Line:
        """The fields of a prediction that are kept."""
        return {name: found[name] for name in self.predicts if name in found}


def likely(probability: float | None) -> str:
    """A probability in words; nothing where there is none."""
    return "" if probability is None else f"probability {probability:.0%}"


def identifiers(sample: Sample) -> dict[str, Any]:
    """Where a sample is, and the fields of its JSON that identify it: ``identifier``, and those that end in ``_id``."""
    own = {
        name: value
        for name, value in sample.meta.items()
        if (name == "identifier" or name.endswith("_id")) and type(value) in (str, int)
    }
    return {"where": sample.where, **own}


def json_lines(lines: Sequence[Line]) -> str:
    """Lines of JSON. Numbers of numpy are plain ones; a mask, bool ``[H, W]``, has run lengths as COCO's masks."""
    return "".join(json.dumps(line, default=_plain) + "\n" for line in lines)


def _lines(pictures: PictureSet, asked: Sequence[str | None], found: Iterable[tuple[Line, Line]]) -> list[Line]:
    """Where each sample is, what was asked, what was predicted, and what is right where that is known."""
    rows = zip(pictures.samples, asked, found, strict=True)
    return [
        {**identifiers(sample), **({} if text is None else {"text": text}), **predicted, **right}
        for sample, text, (predicted, right) in rows
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == np.bool_ and value.ndim == 2:
        return run_lengths(value)
    assert isinstance(value, np.ndarray | np.generic), f"no plain value of {type(value)}"
    return value.tolist()


def _write(lines: Sequence[Line], path: Path) -> None:
    path.write_text(json_lines(lines), encoding="utf-8")
