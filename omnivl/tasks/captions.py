"""Captions by the generation decoder: exact match, keyword F1, BLEU."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Unpack

import numpy as np
import torch

from moe.ranges import Range
from omnivl.chain.gather import together
from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import writing_search
from omnivl.inference.patch_attention import PatchAttention, patch_attention
from omnivl.inference.pictures import PictureSet
from omnivl.inference.search import Choice
from omnivl.tasks.examples import Told
from omnivl.tasks.needs import Head, Need
from omnivl.tasks.predicting import Judged, Line, PredictingTask
from omnivl.tasks.results import Score, TaskResult, mean_score
from omnivl.tasks.sample_fields import places_by
from omnivl.tasks.scorers.captions import CaptionScores, caption_scores
from omnivl.tasks.spelling import comparable

Official = Literal["BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "SPICE"]

References = Sequence[Sequence[str]]
"""All captions of each sample, at least one."""

STOP_WORDS = frozenset({"a", "an", "the", "of", "with", "and", "in", "on", "to"})


@dataclass(frozen=True)
class WritingTask(PredictingTask):
    """Base of tasks in which the generation decoder writes a caption for each picture or clip.

    Attributes:
        objective: Key of the objective whose head generates: of kind ``lm``, or ``prefix_lm`` for a language model.
        num_beams: 1 decodes greedily.
        length_penalty: Of the beams' texts the one is taken that maximises log probability / length ** length_penalty.
        min_length: Smallest number of tokens of a caption.
        max_length: Largest number of tokens of a caption, its end included and a prompt not, if that is less than the
            model's texts have room for; null for no other bound.
        repetition_penalty: Above 1, tokens that a caption has already are less likely.
    """

    objective: str = "lm"
    max_samples: Annotated[int, Range(1)] = 512
    num_beams: Annotated[int, Range(1)] = 1
    length_penalty: Annotated[float, Range(-100, 100)] = 0.0
    min_length: Annotated[int, Range(0)] = 0
    max_length: Annotated[int, Range(1)] | None = None
    repetition_penalty: Annotated[float, Range(above=0, high=100)] = 1.0

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that generates."""
        return (Head(self.objective),)

    def written(self, pictures: PictureSet, encoder: Encoder) -> list[str]:
        """The caption of each picture or clip.

        Raises:
            UserError: The objective writes no texts, or ``min_length`` is larger than its texts can be.
        """
        choice: Choice = {
            "length_penalty": self.length_penalty,
            "min_length": self.min_length,
            "repetition_penalty": self.repetition_penalty,
        }
        return write_captions(pictures, encoder, self.objective, self.num_beams, self.max_length, **choice)

    def asked(self, pictures: PictureSet) -> list[str | None]:
        """See ``PredictingTask``: nothing, as captions are what is right."""
        return [None] * len(pictures)

    def attention(
        self, pictures: PictureSet, places: Sequence[int], predicted: Sequence[Line], encoder: Encoder
    ) -> PatchAttention | None:
        """See ``PredictingTask``: of the written words."""
        texts = [predicted[place]["caption"] for place in places]
        return patch_attention(encoder, self.objective, pictures.chosen(places), texts)


@dataclass(frozen=True)
class CaptionTask(WritingTask):
    """Captions by the generation decoder: exact match, keyword F1 and BLEU.

    Attributes:
        official: Scores of the field's own programs to add, of ``BLEU-4``, ``METEOR``, ``ROUGE-L``, ``CIDEr-D`` and
            ``SPICE``; they need the extra ``tasks``, METEOR and SPICE also java (``omnivl.tasks.scorers.captions``).
        by: Field by whose values all scores are reported as well, such as NoCaps' ``domain``; null for none. The
            samples of a value are a set of their own: its BLEU-4 and CIDEr-D are counted over them alone.
    """

    right_means: ClassVar[str] = "equal to one of the sample's captions, without case, accents and spaces at marks"

    kind: Literal["caption"] = "caption"
    official: tuple[Official, ...] = ()
    by: str | None = None

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        whole = ("exact match", "keyword F1", "BLEU-4", *(f"{name}, official" for name in self.official))
        return (*whole, *(f"{name}, *" for name in whole))

    def run(self, encoder: Encoder) -> TaskResult:
        """See ``PredictingTask``.

        Raises:
            UserError: One of the official scores cannot run on this machine.
        """
        if self.official:  # before anything is written, which takes long
            self._run_official(["a cat"], [["a cat"]])
        return super().run(encoder)

    @property
    def predicts(self) -> tuple[str, ...]:
        """See ``PredictingTask``."""
        return ("caption",)

    def predict(self, pictures: PictureSet, encoder: Encoder) -> Sequence[Line]:
        """See ``PredictingTask``: the ``caption``."""
        return [{"caption": caption} for caption in self.written(pictures, encoder)]

    def truth(self, pictures: PictureSet, encoder: Encoder) -> list[tuple[str, ...]]:
        """See ``PredictingTask``: all captions of a sample."""
        return pictures.all_captions

    def judge(
        self, pictures: PictureSet, predicted: Sequence[Line], truth: Sequence[tuple[str, ...]], encoder: Encoder
    ) -> Judged:
        """See ``PredictingTask``; a caption is right if it is one of the sample's.

        Both sides are compared as ``comparable`` has them.
        """
        shown = [one["caption"] for one in predicted]
        scores = self._scores("", shown, truth, encoder)
        for name, places in ({} if self.by is None else places_by(pictures.samples, self.by)).items():
            own = [shown[place] for place in places], [truth[place] for place in places]
            scores += self._scores(f", {name}", *own, encoder)
        found = zip(_exact(shown, truth), _keyword_f1(shown, truth), strict=True)
        return Judged(tuple(scores), [{"right": one, "keyword_f1": value} for one, value in found])

    def told(
        self, pictures: PictureSet, place: int, found: Line, truth: tuple[str, ...], own: Line, encoder: Encoder
    ) -> Told:
        """See ``PredictingTask``: all captions of the sample."""
        return Told(found["caption"] or "(nothing)", " / ".join(truth), f"keyword F1 {own['keyword_f1']:.2f}")

    def _scores(self, of: str, written: Sequence[str], truth: References, encoder: Encoder) -> list[Score]:
        """The scores of a set of captions.

        Args:
            of: What stands behind the names of its figures.
            written: Its captions.
            truth: All captions of each of its samples.
            encoder: As for ``run``.
        """
        return [
            mean_score(self.name, f"exact match{of}", _exact(written, truth)),
            mean_score(self.name, f"keyword F1{of}", _keyword_f1(written, truth)),
            Score(self.name, f"BLEU-4{of}", _bleu(written, truth), None, None, len(written)),
            *self._official(of, written, truth, encoder),
        ]

    def _official(self, of: str, written: Sequence[str], references: References, encoder: Encoder) -> Iterator[Score]:
        """The scores of the field's own programs, which one replica runs.

        Raises:
            UserError: One of them cannot run on this machine.
        """
        if not self.official:
            return
        gather, count = encoder.gather, len(written)
        values = torch.zeros(len(self.official), dtype=torch.float64, device=encoder.device)
        each = torch.zeros(len(self.official), count, dtype=torch.float64, device=encoder.device)

        def scored() -> None:
            if gather.replica == 0:
                found = self._run_official(written, references)
                for place, name in enumerate(self.official):
                    values[place] = found.values[name]
                    each[place] = torch.from_numpy(found.each[name]) if name in found.each else math.nan

        together(gather, encoder.device, scored)
        for name, value, own in zip(self.official, gather.total(values), gather.total(each).cpu().numpy(), strict=True):
            metric, graded = f"{name}, official{of}", name != "CIDEr-D"
            if np.isnan(own).any():
                yield Score(self.name, metric, float(value), None, None, count, graded)
            else:
                yield mean_score(self.name, metric, own, graded=graded)

    def _run_official(self, written: Sequence[str], references: References) -> CaptionScores:
        """All of the scores that are asked for.

        Raises:
            UserError: One of them cannot run on this machine.
        """
        found = caption_scores(written, references, self.official)
        for name, reason in found.left_out.items():
            raise UserError(f"task {self.name}: {name} cannot be computed: {reason}; leave it out of 'official'")
        return found


def write_captions(
    pictures: PictureSet,
    encoder: Encoder,
    objective: str,
    num_beams: int,
    max_length: int | None = None,
    **choice: Unpack[Choice],
) -> list[str]:
    """A generated caption for every picture, in order, equal on every replica.

    Args:
        pictures: The pictures or clips.
        encoder: A stage with the objective's head.
        objective: Key of the objective.
        num_beams: 1 decodes greedily.
        max_length: See ``writing_search``.
        choice: See ``SearchOptions``.

    Raises:
        UserError: The objective writes no texts, or ``min_length`` is larger than its texts can be.
    """
    writing = encoder.writing(objective)
    texts = [] if writing.beside is None else [writing.beside] * len(pictures)
    search = writing_search(writing, num_beams, max_length, **choice)
    written = encoder.generate(objective, pictures, search, texts)
    return [writing.tokenizer.decode(tokens) for tokens in written.tolist()]


def _exact(written: Sequence[str], references: References) -> list[bool]:
    """Whether each caption is one of its references."""
    return [comparable(text) in [comparable(one) for one in own] for text, own in zip(written, references, strict=True)]


def _keyword_f1(written: Sequence[str], references: References) -> list[float]:
    """The keyword F1 of each caption against the best of its references."""
    return [max(keyword_f1(text, one) for one in own) for text, own in zip(written, references, strict=True)]


def _bleu(written: Sequence[str], references: References) -> float:
    """BLEU-4 of a set by sacrebleu, as a share of 1."""
    import sacrebleu

    spelled = [[comparable(one) for one in own] for own in references]
    most = max(len(own) for own in spelled)
    padded = [[own[min(i, len(own) - 1)] for own in spelled] for i in range(most)]
    score: float = sacrebleu.corpus_bleu([comparable(one) for one in written], padded, lowercase=True).score
    return score / 100


def keywords(text: str) -> frozenset[str]:
    """The words of a text without articles and prepositions, as ``comparable`` has them."""
    return frozenset(word for word in comparable(text).split() if word[0].isalnum()) - STOP_WORDS


def keyword_f1(written: str, reference: str) -> float:
    """Harmonic mean of precision and recall of keywords as sets; 0 where none is shared.

    ``2 |A & B| / (|A| + |B|)``: "red heart" against "black heart" is 2 * 1 / 4 = 0.5.
    """
    ours, theirs = keywords(written), keywords(reference)
    shared = len(ours & theirs)
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0
