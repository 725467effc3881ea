"""k-NN classification by visual embeddings, without any training of a head."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.tasks.classification import commonest
from omnivl.tasks.needs import Embeddings, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import mean_score
from omnivl.tasks.task import Samples, Where


@dataclass(frozen=True)
class NeighborsTask(PredictingTask):
    """Share of samples whose class the nearest labelled samples vote for.

    Each of the ``k`` nearest neighbours votes for its class with the weight exp(similarity / temperature).

    Attributes:
        known: Filter of the labelled samples, from the same source: ``{split: [train]}``.
        k: Number of neighbours.
        temperature: See above.
        most_known: Upper bound on the number of labelled samples; more are thinned evenly.

    Source: Wu et al., arXiv 1805.01978, section 3.4 (weighted k-NN, temperature 0.07); DINO, arXiv 2104.14294, uses 20
        neighbours.
    """

    reads: ClassVar[Reads] = "label"

    kind: Literal["neighbors"] = "neighbors"
    known: Where = field(default_factory=dict)
    k: Annotated[int, Range(1)] = 20
    temperature: Annotated[float, Range(above=0)] = 0.07
    most_known: Annotated[int, Range(1)] = 20_000

    @property
    def needs(self) -> tuple[Need, ...]:
        """Embeddings."""
        return (Embeddings(),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy",)

    @property
    def samples(self) -> tuple[Samples, ...]:
        """The queries, and the labelled samples."""
        known = Samples(("known",), self.source, self.media, self.known, self.reads, self.most_known)
        return (*super().samples, known)

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("label",)

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``label`` with the most votes.

        Raises:
            DataError: A query is among the labelled samples.
        """
        given = self.media, self.known, encoder.model.inputs, self.most_known, self.reads
        known = PictureSet(self.source, *given)
        if shared := {sample.where for sample in pictures.samples} & {sample.where for sample in known.samples}:
            raise DataError(
                f"task {self.name}: {len(shared)} samples are among the labelled ones too, such as {min(shared)}; make "
                "`where` and `known` exclude each other"
            )
        classes = sorted({str(sample.label) for sample in known.samples})
        places = {name: place for place, name in enumerate(classes)}
        labels = torch.tensor([places[str(sample.label)] for sample in known.samples])
        queries, keys = (encoder.pictures(one).flatten(1) for one in (pictures, known))
        votes = torch.zeros(len(queries), len(classes), dtype=torch.float64)
        for start in range(0, len(queries), 1024):
            similarity, nearest = (queries[start : start + 1024] @ keys.T).topk(min(self.k, len(keys)), dim=1)
            weights = (similarity.double() / self.temperature).exp()
            votes[start : start + 1024].scatter_add_(1, labels[nearest], weights)
        return [{"label": classes[place]} for place in votes.argmax(dim=1).tolist()]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[str]:
        """See ``PredictingTask``: the samples' own labels."""
        return [str(sample.label) for sample in pictures.samples]

    def judge(self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[str], encoder: Encoder) -> Judged:
        """See ``PredictingTask``."""
        right = [one["label"] == own for one, own in zip(predicted, truth, strict=True)]
        accuracy = mean_score(self.name, "accuracy", right, chance=commonest(truth))
        return Judged((accuracy,), [{"right": one} for one in right])
