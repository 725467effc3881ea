"""Few-shot in-context learning: labelled examples stand before the query, and nothing is trained."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch

from moe.ranges import Range
from omnivl.data.documents import END, PICTURE
from omnivl.data.sources.base import Sample
from omnivl.data.sources.scenes.picture import as_png
from omnivl.data.templates import filled, unknown_places
from omnivl.errors import DataError, UserError
from omnivl.inference.documents import answer_log_probabilities
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import PatchAttention, patch_attention
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.objectives.answer import Answer
from omnivl.objectives.answers import ANSWERS
from omnivl.objectives.choose import Choose
from omnivl.objectives.interleaved_lm import InterleavedLM
from omnivl.objectives.vqa import VQA
from omnivl.randomness import generator
from omnivl.tasks.answering import answers_of, as_people_spell, counted, likeliest, people_of
from omnivl.tasks.classification import commonest
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Chooses, Lack, Need, Provided
from omnivl.tasks.predicting import Judged, Line, PredictingTask, likely
from omnivl.tasks.results import mean_score
from omnivl.tasks.sample_fields import text_of
from omnivl.tasks.scorers.vqa import best_constant, vqa_accuracy
from omnivl.tasks.spelling import comparable
from omnivl.tasks.task import Samples, Where

LABEL, TEXT, ANSWER = "label", "text", "answer"
"""Places of templates beside the fields of a sample's JSON: its class, its first text, the right answer."""


class TakesSets(Need):
    """An architecture that takes sets of pictures."""

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        if "set" in stage.model.shows:
            return None
        return Lack(f"has architecture {stage.model.kind!r}, which takes no sets of pictures", "change model.kind")


@dataclass(frozen=True)
class FewShotTask(PredictingTask):
    """Accuracy with so many labelled examples before each query, from which the model has to see what is wanted.

    A query becomes an interleaved document: the pictures of its examples and its own are a set in this order, and the
    text is ``example`` for each example and ``query`` at the end. Examples are drawn anew for each query, uniformly
    from the samples of ``support``, never the query itself; more of them begin with the same ones.

    An objective of kind ``interleaved_lm`` reads ``<image>`` before each example and the query, and ``<EOC>`` behind
    each example. It ranks ``answers``, which have to be given, by the probability that the text goes on with them.
    An objective of kind ``answer`` ranks ``answers`` by their probability if they are given (close-ended), else it
    writes (open-ended). One of kind ``choose`` chooses among ``answers``, one of kind ``vqa`` from its own list.
    Answers compare without case and spaces at marks; with ``answer: answers``, the list of several people's answers,
    the score is VQA accuracy. Chance is the best constant answer, without the sample.

    Attributes:
        objective: Key of the objective that answers.
        source: As for every task; ``scenes`` has generated samples of many tasks. Samples have one picture each.
        support: Filter of the samples that examples are drawn from: ``{split: [train]}``.
        support_source: Their source; if empty, that of the queries.
        most_support: Upper bound on their number; more are thinned evenly.
        shots: Numbers of examples, each with an accuracy of its own.
        text_only: Examples without their pictures that stand before the query where ``shots`` is 0, so that the model
            sees the form of an answer.
        answer: Field with the right answer; ``label`` is the sample's class, ``answers`` a list of people's answers.
        answers: Answers to choose from: a list, or the path of a text file with an answer on each line.
        example: Text of an example. Places in braces: ``{answer}``, the right one; ``{text}``, the sample's first text;
            ``{label}``, its class; and any text of its JSON, such as ``{question}``.
        query: Text of the query, with the same places but ``{answer}``.
        seed: Of the draw of examples.

    Source: Alayrac et al., Flamingo, arXiv 2204.14198, section 4 and appendix (prompts; two examples without pictures
        for 0 shots; open- and close-ended scores); Awadalla et al., OpenFlamingo, arXiv 2308.01390, section 4 (examples
        drawn uniformly for each query from 2,048 of the training split).
    Differs: a text that is longer than the model's is refused; there it is cut.
    """

    reads: ClassVar[Reads] = "media"
    lists: ClassVar[tuple[str, ...]] = ("answers",)
    right_means: ClassVar[str] = (
        "with the most examples, what was given is the right answer in any spelling, or has a VQA accuracy above 0"
    )

    kind: Literal["few_shot"] = "few_shot"
    objective: str = "answer"
    source: str = "scenes"
    max_samples: Annotated[int, Range(1)] = 1024
    support: Where = field(default_factory=dict)
    support_source: str = ""
    most_support: Annotated[int, Range(1)] = 2048
    shots: tuple[int, ...] = (0, 4, 8)
    text_only: Annotated[int, Range(0)] = 2
    answer: str = "answer"
    answers: str | tuple[str, ...] = ()
    example: str = "{text} {answer}."
    query: str = "{text}"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: The list of answers cannot be read, or an option does not fit.
        """
        super().__post_init__()
        found = [
            ("media", self.media, self.media == "image", "'image'; change it"),
            ("pictures", list(self.pictures), not self.pictures, "none: samples have one picture each; remove it"),
            (
                "shots",
                list(self.shots),
                bool(self.shots) and list(self.shots) == sorted({shots for shots in self.shots if shots >= 0}),
                "numbers from 0 on, each once, in rising order; change it",
            ),
            ("example", self.example, "{answer}" in self.example, "a text with {answer}; add it"),
            ("query", self.query, "{answer}" not in self.query, "a text without {answer}; take it out"),
        ]
        for name, got, holds, allowed in found:
            if not holds:
                raise UserError(f"task {self.name}: {name} is {got!r}; allowed: {allowed}")

    @property
    def needs(self) -> tuple[Need, ...]:
        """Sets of pictures, and the head that answers."""
        kinds = (VQA, Answer, Choose, InterleavedLM) if self.answers else (VQA, Answer)
        return TakesSets(), Chooses(self.objective, kinds)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy, * shots",)

    @property
    def samples(self) -> tuple[Samples, ...]:
        """The queries, and the samples that examples are drawn from."""
        path, source = (
            (("support_source",), self.support_source) if self.support_source else (("support",), self.source)
        )
        return (*super().samples, Samples(path, source, self.media, self.support, self.reads, self.most_support))

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("answers", "probabilities")

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: ``answers`` and their ``probabilities``, by the number of examples.

        Probabilities are those of the head among its list or ``answers``, of a ranked answer that of writing it; None
        of one that is written freely. The gallery needs what was ``read`` with the most examples: picture and text.

        Raises:
            DataError: There are too few examples, one lacks its answer or a field, or a text is too long.
        """
        support, media = self._support(encoder), dict[str, tuple[str, bytes]]()
        drawn = list(self._drawn(pictures.samples, support))
        found: list[dict[str, Any]] = [{"answers": {}, "probabilities": {}} for _ in drawn]
        for shots in self.shots:
            documents, texts = self._documents(pictures, drawn, support, shots, encoder, media)
            said = self._answers(documents, texts, shots, encoder)
            for line, (answer, share) in zip(found, said, strict=True):
                line["answers"][str(shots)], line["probabilities"][str(shots)] = answer, share
            if shots == self.shots[-1]:
                for line, document, text in zip(found, documents.samples, texts, strict=True):
                    line["read"] = document, text
        return found

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[list[str]]:
        """See ``PredictingTask``: the right answer, or people's answers."""
        return [self._right(sample) for sample in pictures.samples]

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[list[str]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; each has its ``scores`` by the number of examples, and is right by the most."""
        people = self.answer == ANSWERS
        chance = best_constant(truth)[1] if people else commonest([own[0] for own in truth])
        scores, each = [], [{"scores": dict[str, float]()} for _ in truth]
        for shots in map(str, self.shots):
            values = [_score(one["answers"][shots], own, people) for one, own in zip(predicted, truth, strict=True)]
            scores.append(mean_score(self.name, f"accuracy, {shots} shots", values, chance=chance))
            for line, value in zip(each, values, strict=True):
                line["scores"][shots] = value
        most = str(self.shots[-1])
        right = [line["scores"][most] > 0 for line in each]
        lines: list[dict[str, Any]] = [{**line, "right": one} for line, one in zip(each, right, strict=True)]
        return Judged(tuple(scores), lines)

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: list[str], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: the answer with the most examples, and what was given with fewer."""
        *fewer, most = map(str, self.shots)
        people = self.answer == ANSWERS
        said = {shots: as_people_spell(answer, truth) for shots, answer in found["answers"].items()}
        parts = [
            f"with {most} example{'s' * (most != '1')}",
            likely(found["probabilities"][most]),
            f"VQA accuracy {own['scores'][most]:.2f}" if people else "",
            *(f"{said[shots]!r} with {shots}" for shots in fewer),
        ]
        return Told(said[most], counted(truth) if people else truth[0], ", ".join(filter(None, parts)))

    def attention(
        self, pictures: PictureSet, places: Sequence[int], predicted: Sequence[Line], encoder: Encoder
    ) -> PatchAttention | None:
        """See ``PredictingTask``: of the whole text with the most examples to all of its pictures.

        One that chooses reads its chosen answer at the end of the text.
        """
        most, objective = self.shots[-1], encoder.chain.objectives[self.objective]
        documents = self._set([predicted[place]["read"][0] for place in places], most, encoder)
        texts = [predicted[place]["read"][1] for place in places]
        if isinstance(objective, Choose):
            given = [predicted[place]["answers"][str(most)] for place in places]
            pairs = zip(texts, given, strict=True)
            texts = [one for text, answer in pairs for one in objective.texts(text, [answer], encoder.reader)]
        return patch_attention(encoder, self.objective, documents, texts)

    def asked(self, pictures: PictureSet) -> list[str]:
        """See ``PredictingTask``: the text of each query, without its examples."""
        return [_filled(self.query, sample, {}) for sample in pictures.samples]

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has an answer and the fields of the query."""
        self.asked(pictures)
        for sample in pictures.samples:
            self._right(sample)

    def _support(self, encoder: Encoder) -> list[Sample]:
        """The samples that examples are drawn from."""
        given = self.media, self.support, encoder.model.inputs, self.most_support, self.reads
        return PictureSet(self.support_source or self.source, *given).samples

    def _documents(
        self,
        pictures: PictureSet,
        drawn: Sequence[Sequence[int]],
        support: Sequence[Sample],
        shots: int,
        encoder: Encoder,
        media: dict[str, tuple[str, bytes]],
    ) -> tuple[PictureSet, list[str]]:
        """Each query behind its examples.

        Args:
            pictures: N queries.
            drawn: Places of the examples of each, at least as many as stand before it.
            support: The samples that examples are drawn from.
            shots: Number of examples with pictures.
            encoder: The trained stage.
            media: See ``_document``.

        Returns:
            N sets of pictures, and N texts.
        """
        before = [own[: shots or self.text_only] for own in drawn]
        shown = {one: self._example(support[one]) for own in before for one in own}
        asked, between = self.asked(pictures), " "
        if isinstance(encoder.chain.objectives[self.objective], InterleavedLM):
            shown = {one: f"{PICTURE if shots else ''}{text}{END}" for one, text in shown.items()}
            asked, between = [f"{PICTURE}{text}" for text in asked], ""
        texts = [between.join([*(shown[one] for one in own), text]) for own, text in zip(before, asked, strict=True)]
        sets = [
            _document(sample, [support[one] for one in own[:shots]], media)
            for sample, own in zip(pictures.samples, before, strict=True)
        ]
        return self._set(sets, shots, encoder), texts

    def _set(self, documents: Sequence[Sample], shots: int, encoder: Encoder) -> PictureSet:
        """Documents with so many pictures before that of the query."""
        names = tuple(str(number) for number in range(shots + 1))
        return PictureSet.of(documents, self.media, encoder.model.inputs, names)

    def _drawn(self, queries: Sequence[Sample], support: Sequence[Sample]) -> Iterator[list[int]]:
        """Places of the examples of each query, as many as the most shots or texts need.

        Raises:
            DataError: There are fewer.
        """
        most = max(self.shots[-1], self.text_only if 0 in self.shots else 0)
        for number, query in enumerate(queries):
            random = generator(self.seed, "few_shot", number)
            some = random.choice(len(support), size=min(len(support), most + 1), replace=False).tolist()
            own = [one for one in some if support[one].where != query.where][:most]
            if len(own) < most:
                raise DataError(
                    f"task {self.name}: {len(own)} samples of support can stand before {query.where}; allowed: {most} "
                    "or more, as shots says; widen support, or lower shots"
                )
            yield own

    def _example(self, sample: Sample) -> str:
        """The text of an example. Of people's answers it has the most frequent one."""
        return _filled(self.example, sample, {ANSWER: Counter(self._right(sample)).most_common(1)[0][0]})

    def _right(self, sample: Sample) -> list[str]:
        """The right answer of a sample, or people's answers."""
        if self.answer == ANSWERS:
            return people_of(sample)
        if self.answer == LABEL and sample.label is not None:
            return [sample.label]
        return [text_of(sample, self.answer)]

    def _answers(
        self, documents: PictureSet, texts: Sequence[str], shots: int, encoder: Encoder
    ) -> list[tuple[str, float | None]]:
        """The answer to each document, and how likely it is.

        Raises:
            DataError: A document's text is longer than the model's.
        """
        objective, choices = encoder.chain.objectives[self.objective], self.answers
        assert isinstance(choices, tuple), "a path is replaced by what the file holds"
        if isinstance(objective, InterleavedLM):
            scores = answer_log_probabilities(self.objective, documents, texts, choices, encoder)
            best = scores.max(dim=1)
            pairs = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
            return [(choices[place], share) for place, share in pairs]
        longest = max(choices, key=lambda one: len(encoder.reader.words(one)), default="")
        for sample, text in zip(documents.samples, texts, strict=True):
            whole = f"{text} {longest}" if isinstance(objective, Choose) else text
            if not encoder.reader.fits(whole):
                raise DataError(
                    f"task {self.name}: the text of {sample.where} with {shots} examples has "
                    f"{len(encoder.reader.words(whole)) + 2} tokens; allowed: {encoder.reader.length}, "
                    "model.text_length; lower shots, shorten example and query, or raise it"
                )
        if not isinstance(objective, Choose):
            return answers_of(self.objective, documents, texts, encoder, choices)
        rows = [one for text in texts for one in objective.texts(text, choices, encoder.reader)]
        candidates = torch.arange(len(rows)).view(len(documents), len(choices))
        return likeliest(objective, encoder.predict(self.objective, documents, rows, candidates), choices)


def _document(query: Sample, examples: Sequence[Sample], media: dict[str, tuple[str, bytes]]) -> Sample:
    """A sample whose files ``0``, ``1`` ... are the pictures of the examples and, last, of the query.

    Args:
        query: The sample that is asked about.
        examples: Samples that stand before it.
        media: Extension and bytes of the pictures met so far, by sample.
    """
    members = {}
    for number, one in enumerate((*examples, query)):
        if one.where not in media:
            media[one.where] = _picture(one)
        extension, data = media[one.where]
        members[f"{number}.{extension}"] = data
    return replace(query, media=None, frames=None, members=members)


def _picture(sample: Sample) -> tuple[str, bytes]:
    """The extension and the bytes of a sample's picture."""
    if sample.frames is not None:
        return "png", as_png(sample.frames[0])
    if sample.media is None:
        raise DataError(f"{sample.where} has no picture, which this task needs; filter it out with `where`")
    return sample.extension, sample.media


def _filled(template: str, sample: Sample, values: Mapping[str, str]) -> str:
    """A template with a sample's fields.

    Raises:
        DataError: The sample lacks one of them.
    """
    own = {name: value for name, value in sample.meta.items() if isinstance(value, str)}
    own |= {TEXT: sample.captions[0]} if sample.captions else {}
    own |= {LABEL: sample.label} if sample.label is not None else {}
    own |= values
    if lacking := unknown_places(template, tuple(own)):
        raise DataError(
            f"{sample.where}: {template!r} asks for {', '.join(lacking)}; allowed: {', '.join(sorted(own)) or 'none'}; "
            "name another field"
        )
    return filled(template, own)


def _score(answer: str, right: Sequence[str], people: bool) -> float:
    """VQA accuracy by people's answers; else whether the answer is the right one."""
    if people:
        return vqa_accuracy(as_people_spell(answer, right), right)
    return float(comparable(answer) == comparable(right[0]))
