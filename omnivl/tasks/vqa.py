"""Visual question answering: VQA accuracy of answers that are chosen from a list, ranked or generated."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.answer import Answer
from omnivl.objectives.vqa import VQA
from omnivl.tasks.answering import answers_of, as_people_spell, counted, people_of
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Chooses, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask, likely
from omnivl.tasks.results import Score, mean_score
from omnivl.tasks.scorers.vqa import best_constant, vqa_accuracy


@dataclass(frozen=True)
class VQATask(PredictingTask):
    """VQA accuracy, for all questions and by their type.

    An objective of kind ``vqa`` chooses from its own list. One of kind ``answer`` ranks ``answers`` if they are given,
    else it generates. The chance of each accuracy is that of the best constant answer for each type of question,
    without the image.

    Attributes:
        objective: Key of the objective that answers.
        source: As for every task; ``questions`` has generated questions.
        answers: Answers that an objective of kind ``answer`` ranks: a list, or the path of a text file with an answer
            on each line; without them it generates freely.
        candidates: Number of answers, those with the likeliest first tokens, that are ranked by all their tokens.
        first_token_twice: Whether the first token counts twice, as in ALBEF's code.
        question: Field of the samples' JSON with the question.
        question_type: Field with its type; questions without one have the type ``other``.
    """

    reads: ClassVar[Reads] = "media"
    lists: ClassVar[tuple[str, ...]] = ("answers",)
    right_means: ClassVar[str] = "VQA accuracy above 0"

    kind: Literal["vqa"] = "vqa"
    objective: str = "vqa"
    source: str = "questions"
    max_samples: Annotated[int, Range(1)] = 1024
    answers: str | tuple[str, ...] = ()
    candidates: Annotated[int, Range(1)] = 128
    first_token_twice: bool = False
    question: str = "question"
    question_type: str = "question_type"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that answers."""
        return (Chooses(self.objective, (VQA, Answer)),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        by_type = "accuracy, *"
        return ("accuracy", by_type, "accuracy by the question's type alone", "accuracy of * to all questions")

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("answer", "probability")

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``answer``; a generated one as the tokenizer decodes it.

        Its ``probability`` is that of the head, of a ranked answer that of writing it; None of a generated one, and
        where the first token counts twice.
        """
        found = self._answers(pictures, self.asked(pictures), encoder)
        return [{"answer": answer, "probability": share} for answer, share in found]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[list[str]]:
        """See ``PredictingTask``: people's answers."""
        return [people_of(sample) for sample in pictures.samples]

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[list[str]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; each has its ``score``, and is right with one above 0."""
        types = [str(sample.meta.get(self.question_type, "other")) for sample in pictures.samples]
        answers = [as_people_spell(one["answer"], given) for one, given in zip(predicted, truth, strict=True)]
        found = [vqa_accuracy(answer, given) for answer, given in zip(answers, truth, strict=True)]
        each = [{"score": score, "right": score > 0} for score in found]
        return Judged(tuple(self._scores(found, truth, types)), each)

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: list[str], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: beside the probability the VQA accuracy, and how many people gave each answer."""
        measures = (likely(found["probability"]), f"VQA accuracy {own['score']:.2f}")
        return Told(as_people_spell(found["answer"], truth), counted(truth), ", ".join(filter(None, measures)))

    def asked(self, pictures: PictureSet) -> list[str]:
        """See ``PredictingTask``: the questions.

        Raises:
            DataError: A sample has none.
        """
        return [self._question(pictures, place) for place in range(len(pictures))]

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a question and answers."""
        self.asked(pictures)
        for sample in pictures.samples:
            people_of(sample)

    def _answers(self, pictures: PictureSet, questions: list[str], encoder: Encoder) -> list[tuple[str, float | None]]:
        """The answer to each question, and how likely it is."""
        assert isinstance(self.answers, tuple), "a path is replaced by what the file holds"
        return answers_of(
            self.objective,
            pictures,
            questions,
            encoder,
            self.answers,
            candidates=self.candidates,
            first_token_twice=self.first_token_twice,
        )

    def _scores(self, found: list[float], people: Sequence[list[str]], types: list[str]) -> list[Score]:
        """Scores for all questions and by type; chance is the best constant answer."""
        of_type: dict[str, list[list[str]]] = defaultdict(list)
        for kind, given in zip(types, people, strict=True):
            of_type[kind].append(given)
        blind = {kind: best_constant(given)[1] for kind, given in of_type.items()}
        count = len(found)
        alone = sum(blind[kind] for kind in types) / count
        majority, share = best_constant(people)
        scores = [
            mean_score(self.name, "accuracy", found, chance=alone),
            Score(self.name, "accuracy by the question's type alone", alone, None, None, count),
            Score(self.name, f"accuracy of {majority!r} to all questions", share, None, None, count),
        ]
        for kind in sorted(of_type):
            own = [value for value, one in zip(found, types, strict=True) if one == kind]
            scores.append(mean_score(self.name, f"accuracy, {kind}", own, chance=blind[kind]))
        return scores

    def _question(self, pictures: PictureSet, place: int) -> str:
        """The question of a sample.

        Raises:
            DataError: It has none.
        """
        sample = pictures.samples[place]
        found = sample.meta.get(self.question)
        if not isinstance(found, str):
            raise DataError(f"{sample.where} has no text {self.question!r}, the question; name its field in 'question'")
        return found
