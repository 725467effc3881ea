"""Accuracy of a trained head that chooses one answer: entailment, statements, questions with one answer, actions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.data.decode import Shot
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import PatchAttention, patch_attention
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.recognize import Recognize
from omnivl.objectives.vqa import VQA
from omnivl.tasks.needs import Chooses, Need, PartsOfPictures
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import mean_score
from omnivl.tasks.sample_fields import places_by, text_of, texts_of
from omnivl.tasks.scorers.nlvr2 import consistent


@dataclass(frozen=True)
class ClassificationTask(PredictingTask):
    """Share of samples of which a head of kind ``vqa`` or ``recognize`` gives the right one of its answers.

    Of a clip or wide picture several views can be looked at: probabilities are averaged, as action recognition does
    (5 clips of 3 crops on Kinetics, 2 of 3 on Something-Something). An answer that is not in the head's list counts as
    wrong. Chance is the share of the most frequent answer, without the sample.

    Attributes:
        objective: Key of the objective that answers.
        source: As for every task; ``scenes`` has generated samples of many tasks.
        answer: Field of the samples' JSON with the right answer; ``label`` is the sample's class.
        options: Field with a sample's own answers, to which the choice is then restricted, as to the names of a
            document of ``scenes``; chance is a random one of them. Null for the whole list.
        by: Field by whose values accuracy is reported as well; null for none.
        identifier: Field with an identifier of NLVR2: adds the share of sentences that are right with all pictures.
        clips: Number of parts of a clip that are looked at, evenly spread.
        span: Share of the clip that each part has.
        crops: Squares of a picture that are looked at, evenly spread along its longer side. More than one needs
            ``model.sizes: fixed``: otherwise the whole picture is looked at.
    """

    reads: ClassVar[Reads] = "media"

    kind: Literal["classification"] = "classification"
    objective: str = "vqa"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 1024
    answer: str = "answer"
    options: str | None = None
    by: str | None = None
    identifier: str | None = None
    clips: Annotated[int, Range(1)] = 1
    span: Annotated[float, Range(above=0, high=1)] = 1.0
    crops: Annotated[int, Range(1)] = 1

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that answers, and views of parts of a picture for several of them."""
        parts = (PartsOfPictures("crops", 1),) if self.crops > 1 else ()
        return (Chooses(self.objective, (VQA, Recognize)), *parts)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy", "accuracy, *", "consistency")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("answer", "probability")

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the chosen ``answer``, and its ``probability``: by softmax, mean over views.

        With ``options`` the softmax is over a sample's own answers alone.
        """
        objective = encoder.chain.objectives[self.objective]
        assert isinstance(objective, VQA | Recognize), "as needs says"
        texts = pictures.captions if isinstance(objective, VQA) else []
        others = None if self.options is None else ~self._among(self.options, pictures, objective.choices)
        views = []
        for start in spread(self.clips):
            for along in spread(self.crops):
                logits = encoder.predict(self.objective, pictures.seen(Shot(self.span, start, along)), texts)
                own = logits if others is None else logits.masked_fill(others, -torch.inf)
                views.append(own.softmax(dim=1))
        share, best = torch.stack(views).mean(dim=0).max(dim=1)
        chosen = [objective.choices[place] for place in best.tolist()]
        return [{"answer": one, "probability": own} for one, own in zip(chosen, share.tolist(), strict=True)]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[str]:
        """See ``PredictingTask``: the right answers."""
        return self._truth(pictures)

    def judge(self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[str], encoder: Encoder) -> Judged:
        """See ``PredictingTask``."""
        answers = [one["answer"] for one in predicted]
        right = np.array([one == own for one, own in zip(answers, truth, strict=True)])
        scores = [mean_score(self.name, "accuracy", right, chance=self._chance(pictures, truth))]
        if self.by is not None:
            for name, places in places_by(pictures.samples, self.by).items():
                chance = self._chance(pictures.chosen(places), [truth[place] for place in places])
                scores.append(mean_score(self.name, f"accuracy, {name}", right[places], chance=chance))
        if self.identifier is not None:
            names = [text_of(sample, self.identifier) for sample in pictures.samples]
            whole = np.array(list(consistent(names, right.tolist()).values()))
            scores.append(mean_score(self.name, "consistency", whole))
        return Judged(tuple(scores), [{"right": one} for one in right.tolist()])

    def attention(
        self, pictures: PictureSet, places: Sequence[int], predicted: Sequence[Line], encoder: Encoder
    ) -> PatchAttention | None:
        """See ``PredictingTask``: in the middle one of several views; none of a head that reads no text."""
        if not isinstance(encoder.chain.objectives[self.objective], VQA):
            return None
        seen = pictures.chosen(places).seen(Shot(self.span))
        return patch_attention(encoder, self.objective, seen, seen.captions)

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has an answer."""
        self._truth(pictures)

    def _among(self, field: str, pictures: PictureSet, choices: Sequence[str]) -> Tensor:
        """Which answers of the head's list are among each sample's own, bool ``[N, A]``.

        Raises:
            DataError: None of a sample's is.
        """
        found = torch.zeros(len(pictures), len(choices), dtype=torch.bool)
        for row, sample in enumerate(pictures.samples):
            own = texts_of(sample, field)
            found[row] = torch.tensor([choice in own for choice in choices])
            if not found[row].any():
                raise DataError(
                    f"{sample.where}: none of its {field!r} ({', '.join(map(repr, own[:8]))}) is in the list of "
                    f"{self.objective!r}; allowed: at least one; add them to its answers, or name another field"
                )
        return found

    def _chance(self, pictures: PictureSet, truth: Sequence[str]) -> float:
        """The share of the most frequent answer; of samples with options, the mean share of one of them."""
        if self.options is None:
            return commonest(truth)
        return float(np.mean([1 / len(set(texts_of(sample, self.options))) for sample in pictures.samples]))

    def _truth(self, pictures: PictureSet) -> list[str]:
        """The right answers."""
        if self.answer == "label":
            return [str(sample.label) for sample in pictures.samples]
        return [text_of(sample, self.answer) for sample in pictures.samples]


def spread(count: int) -> list[float]:
    """So many places from 0 to 1, evenly spread; a single one in the middle."""
    return [0.5] if count == 1 else [place / (count - 1) for place in range(count)]


def commonest(answers: Sequence[str]) -> float:
    """The share of the most frequent answer."""
    return Counter(answers).most_common(1)[0][1] / len(answers)
