"""Choice among each sample's own options: answers and reasons (VCR), turns of a dialogue (VisDial)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.choose import Choose
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.results import Gallery, GalleryRow, Score, TaskResult, mean_score
from omnivl.tasks.sample_fields import place_of, texts_of
from omnivl.tasks.scorers.dialogue import answer_ranks, ndcg
from omnivl.tasks.task import Task

_RELEVANCE = "relevance"


@dataclass(frozen=True)
class OptionsTask(Task):
    """How an objective of kind ``choose`` ranks each sample's options.

    Reported are accuracy, the mean reciprocal rank, R@5 and R@10 and the mean rank where there are more than 10
    options, NDCG where samples have ``relevance``, and with ``reasons`` VCR's three accuracies: answer, reason given
    the right answer, and both.

    Attributes:
        objective: Key of the objective that chooses; its options name the fields.
        source: As for every task; ``scenes`` has generated samples of many tasks.
        reasons: Key of a second objective that chooses among reasons, as VCR's rationales; null for none.
        gallery: Number of choices to keep for the report.
    """

    reads: ClassVar[Reads] = "media"

    kind: Literal["options"] = "options"
    objective: str = "choose"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 512
    reasons: str | None = None
    gallery: Annotated[int, Range(0)] = 12

    @property
    def needs(self) -> tuple[Need, ...]:
        """The heads that choose."""
        keys = [self.objective, *([] if self.reasons is None else [self.reasons])]
        return tuple(Chooses(key, (Choose,)) for key in keys)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy", "mean reciprocal rank", "R@*", "mean rank", "NDCG", "reason given the right answer", "both")

    def run(self, encoder: Encoder) -> TaskResult:
        """Scores every option of every sample.

        Raises:
            DataError: A sample lacks what the task reads, or samples have different numbers of options.
        """
        pictures = self.picture_set(encoder)
        scores, right = self._scores(self.objective, pictures, encoder)
        ranks, count = answer_ranks(scores, right), scores.shape[1]
        hits = ranks == 1
        guessed = float(np.mean(1 / np.arange(1, count + 1)))
        found = [
            mean_score(self.name, "accuracy", hits, chance=1 / count),
            mean_score(self.name, "mean reciprocal rank", 1 / ranks, chance=guessed),
        ]
        for most in (5, 10):
            if count > most:
                found.append(mean_score(self.name, f"R@{most}", ranks <= most, chance=most / count))
        found.append(mean_score(self.name, "mean rank", ranks, chance=(count + 1) / 2, graded=False))
        if _RELEVANCE in pictures.samples[0].meta:
            relevance = np.array([sample.meta[_RELEVANCE] for sample in pictures.samples], dtype=np.float64)
            found.append(mean_score(self.name, "NDCG", ndcg(scores, relevance)))
        if self.reasons is not None:
            found += self._reasons(self.reasons, pictures, encoder, hits)
        return TaskResult(tuple(found), self._gallery(pictures, scores, hits, encoder))

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a text; what else it needs depends on the objective."""
        _ = pictures.captions

    def _scores(self, key: str, pictures: PictureSet, encoder: Encoder) -> tuple[NDArray[np.float64], list[int]]:
        """Scores ``[N, K]`` of the options, and the indices of the right ones."""
        objective = encoder.chain.objectives[key]
        assert isinstance(objective, Choose), "as needs says"
        texts: list[str] = []
        right: list[int] = []
        count = len(texts_of(pictures.samples[0], objective.field))
        for sample, caption in zip(pictures.samples, pictures.captions, strict=True):
            options = texts_of(sample, objective.field)
            if len(options) != count:
                raise DataError(f"{sample.where} has {len(options)} options; allowed: {count}, as the first sample has")
            right.append(place_of(sample, objective.index, options))
            texts += objective.texts(caption, options, [sample.meta.get(name) for name in objective.context])
        candidates = torch.arange(len(texts)).view(len(pictures), count)
        return encoder.predict(key, pictures, texts, candidates).double().numpy(), right

    def _reasons(
        self, key: str, pictures: PictureSet, encoder: Encoder, answered: NDArray[np.bool_]
    ) -> Sequence[Score]:
        scores, right = self._scores(key, pictures, encoder)
        hits = answer_ranks(scores, right) == 1
        chance = 1 / scores.shape[1]
        return (
            mean_score(self.name, "reason given the right answer", hits, chance=chance),
            mean_score(self.name, "both", answered & hits),
        )

    def _gallery(
        self, pictures: PictureSet, scores: NDArray[np.float64], hits: NDArray[np.bool_], encoder: Encoder
    ) -> tuple[Gallery, ...]:
        """Some samples, evenly spread, with the option chosen."""
        objective, count = encoder.chain.objectives[self.objective], len(pictures)
        assert isinstance(objective, Choose)
        rows = []
        for place in (number * count // self.gallery for number in range(min(self.gallery, count))):
            chosen = texts_of(pictures.samples[place], objective.field)[int(scores[place].argmax())]
            query = pictures.captions[place], pictures.thumbnail(place)
            rows.append(GalleryRow(*query, (chosen,), ("",), (bool(hits[place]),)))
        return (Gallery(f"{self.name}: choices", tuple(rows)),) if rows else ()
