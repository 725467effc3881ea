"""Retrieval between pictures or clips and texts by the matching head, pair by pair."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.tasks.needs import Need, ScoresPairs
from omnivl.tasks.predicting import KeepingTask
from omnivl.tasks.ranking import LOWER_RANKS, first_texts, found_galleries, metrics_of, scores_of_ranks
from omnivl.tasks.results import TaskResult
from omnivl.tasks.scorers.recall import Ranked, Relevance, ranks_both_ways


@dataclass(frozen=True)
class MatchingTask(KeepingTask):
    """Retrieval in both directions with R@1, R@5, R@10 and the median rank, for models without contrastive embeddings.

    Every picture goes through the model with every text: N pictures with distinct captions cost N * N passes.

    Attributes:
        objective: Key of the objective whose head matches, such as ``itm``.
        max_samples: As for every task, with a smaller default.
        gallery: Number of queries to keep for the report.
    """

    lower_is_better: ClassVar[tuple[str, ...]] = LOWER_RANKS

    kind: Literal["matching"] = "matching"
    objective: str = "itm"
    max_samples: Annotated[int, Range(1)] = 128
    gallery: Annotated[int, Range(0)] = 0

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that matches."""
        return (ScoresPairs(self.objective),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return (*metrics_of(f"{self.media}->text"), *metrics_of(f"text->{self.media}"))

    def run(self, encoder: Encoder) -> TaskResult:
        """Ranks all texts for every picture and all pictures for every text by the log odds that they match."""
        pictures = self.picture_set(encoder)
        captions = pictures.captions
        texts = sorted(set(captions))
        columns = torch.split(torch.arange(len(texts)), encoder.batch_size)
        scores = torch.cat(
            [encoder.predict(self.objective, pictures, texts, some.expand(len(pictures), -1)) for some in columns],
            dim=1,
        )
        columns_of = {text: place for place, text in enumerate(texts)}
        relevance = Relevance(tuple((columns_of[caption],) for caption in captions), len(texts))
        rows = scores.numpy().__getitem__
        of_pictures, of_texts = ranks_both_ways(rows, relevance)
        both = rows, scores.T.contiguous().numpy().__getitem__
        galleries = found_galleries(self.name, self.media, pictures, texts, relevance, both, self.gallery)
        return TaskResult(
            (
                *scores_of_ranks(self.name, f"{self.media}->text", [Ranked(of_pictures, relevance)]),
                *scores_of_ranks(self.name, f"text->{self.media}", [Ranked(of_texts, relevance.transposed())]),
            ),
            galleries,
            self.kept(pictures, first_texts(texts, rows, relevance)),
        )
