"""Sentiment, or another number, from a text with a picture or clip."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, PictureSet, Reads
from omnivl.objectives.regress import Regress
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.results import Score, TaskResult, mean_score
from omnivl.tasks.sample_fields import number_of
from omnivl.tasks.scorers.sentiment import is_right_7, sentiment_scores
from omnivl.tasks.task import Task


@dataclass(frozen=True)
class SentimentTask(Task):
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

    def run(self, encoder: Encoder) -> TaskResult:
        """Predicts the sentiment of every sample.

        Raises:
            DataError: A sample lacks what the task reads.
        """
        pictures = self.picture_set(encoder)
        truth = np.array([number_of(sample, self.number) for sample in pictures.samples])
        predicted = encoder.predict(self.objective, pictures, pictures.captions).double().numpy()
        found = sentiment_scores(predicted, truth, self.swapped)
        constant = float(np.abs(truth - np.median(truth)).mean())
        scores = [
            mean_score(self.name, "MAE", np.abs(predicted - truth), chance=constant, graded=False),
            mean_score(self.name, "Acc-7", is_right_7(predicted, truth)),
        ]
        left = {name: value for name, value in found.items() if name not in ("MAE", "Acc-7") and np.isfinite(value)}
        scores += [
            Score(self.name, name, value, None, None, len(truth), graded=name != "correlation")
            for name, value in left.items()
        ]
        return TaskResult(tuple(scores))

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a text and a number."""
        _ = pictures.captions
        for sample in pictures.samples:
            number_of(sample, self.number)
