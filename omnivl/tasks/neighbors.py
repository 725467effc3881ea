"""k-NN classification by visual embeddings, without any training of a head."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.tasks.classification import commonest
from omnivl.tasks.needs import Embeddings, Need
from omnivl.tasks.results import TaskResult, mean_score
from omnivl.tasks.task import Samples, Task, Where


@dataclass(frozen=True)
class NeighborsTask(Task):
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

    def run(self, encoder: Encoder) -> TaskResult:
        """Votes.

        Raises:
            DataError: A query is among the labelled samples.
        """
        pictures = self.picture_set(encoder)
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
        found = [classes[place] for place in votes.argmax(dim=1).tolist()]
        truth = [str(sample.label) for sample in pictures.samples]
        right = [one == own for one, own in zip(found, truth, strict=True)]
        return TaskResult((mean_score(self.name, "accuracy", right, chance=commonest(truth)),))
