"""Sentiment, or another number, from a text with a picture or clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, PictureSet, Reads
from omnivl.objectives.regress import Regress
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import Score, mean_score
from omnivl.tasks.sample_fields import number_of
from omnivl.tasks.scorers.sentiment import is_right_7, sentiment_scores


@dataclass(frozen=True)
class SentimentTask(PredictingTask):
    """Error, correlation and accuracies of a sentiment from -3 to 3, as CMU-MOSI reports them.

    Two classes come in two versions: ``has0`` cuts at >= 0, ``non0`` leaves out samples of sentiment 0 and cuts at > 0.
    Chance of the error is that of the median.

    Attributes:
        objective: Key of the objective, of kind ``regress``.
        source: As for every task; ``scenes`` has generated clips of faces.
        number: Field of the samples' JSON with the sentiment.
        swapped: Whether F1 weighs classes by their share of the predictions, as the code of MulT and MISA does.
    """

    reads: ClassVar[Reads] = "media"
    lower_is_better: ClassVar[tuple[str, ...]] = ("MAE",)
    right_means: ClassVar[str] = "the same whole number from -3 to 3 (Acc-7)"

    kind: Literal["sentiment"] = "sentiment"
    objective: str = "regress"
    source: str = "scenes"
    media: Media = "video"
    max_samples: Annotated[int, Range(1)] = 1024
    number: str = "sentiment"
    swapped: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that predicts the number."""
        return (Chooses(self.objective, (Regress,)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("MAE", "correlation", "Acc-7", "Acc-2 *", "F1 *")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("number",)

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``number``."""
        found = encoder.predict(self.objective, pictures, pictures.captions)
        return [{"number": number} for number in found.tolist()]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[float]:
        """See ``PredictingTask``: the right numbers."""
        return [number_of(sample, self.number) for sample in pictures.samples]

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[float], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; a number is right in the sense of Acc-7."""
        numbers, right = np.array([one["number"] for one in predicted]), np.array(truth)
        found, equal = sentiment_scores(numbers, right, self.swapped), is_right_7(numbers, right)
        constant = float(np.abs(right - np.median(right)).mean())
        scores = [
            mean_score(self.name, "MAE", np.abs(numbers - right), chance=constant, graded=False),
            mean_score(self.name, "Acc-7", equal),
        ]
        left = {name: value for name, value in found.items() if name not in ("MAE", "Acc-7") and np.isfinite(value)}
        scores += [
            Score(self.name, name, value, None, None, len(truth), graded=name != "correlation")
            for name, value in left.items()
        ]
        return Judged(tuple(scores), [{"right": bool(one)} for one in equal])

    def told(self, pictures: PictureSet, place: int, found: Line, truth: float, own: Line, encoder: Encoder) -> Told:
        """See ``PredictingTask``: both numbers."""
        return Told(f"{found['number']:+.2f}", f"{truth:+.2f}", f"error {abs(found['number'] - truth):.2f}")

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a text and a number."""
        _ = pictures.captions
        for sample in pictures.samples:
            number_of(sample, self.number)
