"""GQA: answers that are chosen from a list, with all figures of the official evaluation."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from moe.ranges import Range
from omnivl.data.convert.lists import load_json
from omnivl.data.sources.base import Sample
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.answers import ANSWERS
from omnivl.objectives.vqa import VQA
from omnivl.tasks.answering import answers_of
from omnivl.tasks.classification import commonest
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import Score, mean_score
from omnivl.tasks.sample_fields import picture_of, text_of, texts_of
from omnivl.tasks.scorers.gqa import (
    Choices,
    GQAQuestion,
    consistencies,
    distribution,
    groups_of,
    is_right,
    valid_and_plausible,
)


@dataclass(frozen=True)
class GQATask(PredictingTask):
    """GQA's figures of the answers of an objective of kind ``vqa``, over the balanced questions.

    A sample's text is the question. Its fields, as the converter has them: ``question_id``, ``answers`` (one),
    ``structural``, ``semantic``, and where the file has them ``detailed``, ``global_group``, ``entailed``,
    ``balanced``. Answers compare as they are written, without the spelling rules of VQA. Chance of an accuracy is the
    share of the most frequent answer, without the picture and the question.

    Attributes:
        objective: Key of the objective that answers.
        source: As for every task; shards of ``omnivl data convert gqa``.
        choices: GQA's file of choices, JSON: adds validity and plausibility. Empty for none.
        consistency: Whether answers to entailed questions are compared, which needs all questions of a split, not
            only the balanced ones, and none of them thinned out by ``max_samples``.
    """

    reads: ClassVar[Reads] = "media"
    lower_is_better: ClassVar[tuple[str, ...]] = ("distribution",)

    kind: Literal["gqa"] = "gqa"
    objective: str = "vqa"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 16384
    choices: str = ""
    consistency: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that answers."""
        return (Chooses(self.objective, (VQA,)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy", "accuracy, *", "consistency", "validity", "plausibility", "distribution")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("answer", "probability")

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the chosen ``answer``, and its ``probability``."""
        found = answers_of(self.objective, pictures, pictures.captions, encoder)
        return [{"answer": answer, "probability": share} for answer, share in found]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[str]:
        """See ``PredictingTask``: the right answers."""
        return [one.answer for one in self._questions(pictures).values()]

    def judge(self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[str], encoder: Encoder) -> Judged:
        """See ``PredictingTask``.

        Raises:
            DataError: No question is balanced, an entailed question is missing, or the file of choices cannot be read
                or lacks a question.
        """
        questions, answers = self._questions(pictures), [one["answer"] for one in predicted]
        scores = self._scores(pictures, questions, dict(zip(questions, answers, strict=True)))
        hits = [answer == own for answer, own in zip(answers, truth, strict=True)]
        return Judged(tuple(scores), [{"right": hit} for hit in hits])

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has the fields of a question; the file of choices is there."""
        _ = pictures.captions
        self._questions(pictures)
        if self.choices and not Path(self.choices).is_file():
            raise DataError(f"task {self.name}: choices is {self.choices!r}, and there is no such file; name GQA's own")

    def _scores(
        self, pictures: PictureSet, questions: Mapping[str, GQAQuestion], predicted: Mapping[str, str]
    ) -> list[Score]:
        shown = {number: picture_of(one) for number, one in zip(questions, pictures.samples, strict=True)}
        right = is_right(questions, predicted)
        if not right:
            raise DataError(f"task {self.name}: no question is balanced, over which GQA's figures are; see `where`")
        groups: dict[str, list[str]] = defaultdict(list)
        for number in right:
            for name in groups_of(questions[number]):
                groups[name].append(number)

        def mean(metric: str, values: Mapping[str, float], chance: float | None = None) -> Score:
            clusters = [shown[number] for number in values]
            return mean_score(self.name, metric, list(values.values()), chance=chance, clusters=clusters)

        def accuracy(metric: str, own: list[str]) -> Score:
            chance = commonest([questions[number].answer for number in own])
            return mean(metric, {number: right[number] for number in own}, chance)

        scores = [accuracy("accuracy", list(right))]
        scores += [accuracy(f"accuracy, {name}", own) for name, own in sorted(groups.items())]
        if self.consistency and (found := consistencies(questions, predicted)):
            scores.append(mean("consistency", found))
        if self.choices:
            pairs = valid_and_plausible(questions, predicted, self._read_choices(set(right)))
            scores.append(mean("validity", {number: valid for number, (valid, _) in pairs.items()}))
            scores.append(mean("plausibility", {number: plausible for number, (_, plausible) in pairs.items()}))
        if (chi_square := distribution(questions, predicted)) is not None:
            scores.append(Score(self.name, "distribution", chi_square, None, None, len(right), graded=False))
        return scores

    def _questions(self, pictures: PictureSet) -> dict[str, GQAQuestion]:
        """The questions by their ids, in the order of the samples.

        Raises:
            DataError: A sample lacks a field, or two samples have one id.
        """
        found: dict[str, GQAQuestion] = {}
        for sample in pictures.samples:
            number = str(sample.meta.get("question_id", sample.key))
            if number in found:
                raise DataError(f"{sample.where}: another sample has the 'question_id' {number!r}, too; leave one out")
            found[number] = _question(sample)
        return found

    def _read_choices(self, wanted: set[str]) -> dict[str, Choices]:
        """The choices of questions that are scored.

        Raises:
            DataError: The file cannot be read, or has another form.
        """
        read = load_json(Path(self.choices))
        found = {}
        for number, own in read.items() if isinstance(read, dict) else ((".", read),):
            lists = [own.get(name) if isinstance(own, dict) else None for name in ("valid", "plausible")]
            if not all(isinstance(one, list) for one in lists):
                raise DataError(
                    f"{self.choices}: {number!r} has no lists 'valid' and 'plausible'; allowed: an object of them for "
                    "each question; give GQA's file of choices of the same split"
                )
            if number in wanted:
                found[number] = Choices(*(frozenset(map(str, one)) for one in lists if one is not None))
        return found


def _question(sample: Sample) -> GQAQuestion:
    """What scores read of a sample.

    Raises:
        DataError: It lacks something.
    """
    group = sample.meta.get("global_group")
    return GQAQuestion(
        answer=texts_of(sample, ANSWERS)[0],
        structural=text_of(sample, "structural"),
        semantic=text_of(sample, "semantic"),
        detailed=str(sample.meta.get("detailed", "")),
        group=None if group is None else str(group),
        entailed=tuple(texts_of(sample, "entailed")) if sample.meta.get("entailed") else (),
        balanced=bool(sample.meta.get("balanced", True)),
    )
