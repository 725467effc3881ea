"""Captions by the generation decoder: exact match, keyword F1, BLEU."""

from dataclasses import dataclass
from typing import Annotated, Literal, Unpack

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import writing_search
from omnivl.inference.pictures import PictureSet
from omnivl.inference.search import Choice
from omnivl.tasks.needs import Head, Need
from omnivl.tasks.results import Gallery, GalleryRow, Score, TaskResult, mean_score
from omnivl.tasks.spelling import comparable
from omnivl.tasks.task import Task

STOP_WORDS = frozenset({"a", "an", "the", "of", "with", "and", "in", "on", "to"})


@dataclass(frozen=True)
class CaptionTask(Task):
    """Captions by the generation decoder: exact match, keyword F1 and BLEU.

    Attributes:
        objective: Key of the objective whose head generates: of kind ``lm``, or ``prefix_lm`` for a language model.
        num_beams: 1 decodes greedily.
        length_penalty: Of the beams' texts the one is taken that maximises log probability / length ** length_penalty.
        min_length: Smallest number of tokens of a caption.
        repetition_penalty: Above 1, tokens that a caption has already are less likely.
        gallery: Number of captions to keep for the report.
    """

    kind: Literal["caption"] = "caption"
    objective: str = "lm"
    max_samples: Annotated[int, Range(1)] = 512
    num_beams: Annotated[int, Range(1)] = 1
    length_penalty: Annotated[float, Range(-100, 100)] = 0.0
    min_length: Annotated[int, Range(0)] = 0
    repetition_penalty: Annotated[float, Range(above=0, high=100)] = 1.0
    gallery: Annotated[int, Range(0)] = 12

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that generates."""
        return (Head(self.objective),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("exact match", "keyword F1", "BLEU-4")

    def run(self, encoder: Encoder) -> TaskResult:
        """Writes a caption for every sample and compares it with all of the sample's own captions.

        Both sides are compared as ``comparable`` has them.

        Raises:
            DataError: A sample has no caption.
        """
        import sacrebleu

        pictures = self.picture_set(encoder)
        known = pictures.captions
        choice: Choice = {
            "length_penalty": self.length_penalty,
            "min_length": self.min_length,
            "repetition_penalty": self.repetition_penalty,
        }
        shown = write_captions(pictures, encoder, self.objective, self.num_beams, **choice)
        written = [comparable(text) for text in shown]
        references = [[comparable(text) for text in sample.captions] for sample in pictures.samples]
        exact = [text in own for text, own in zip(written, references, strict=True)]
        f1 = [max(keyword_f1(text, one) for one in own) for text, own in zip(written, references, strict=True)]
        most = max(len(own) for own in references)
        padded = [[own[min(i, len(own) - 1)] for own in references] for i in range(most)]
        bleu = sacrebleu.corpus_bleu(written, padded, lowercase=True).score / 100
        count = len(pictures)
        scores = (
            mean_score(self.name, "exact match", exact),
            mean_score(self.name, "keyword F1", f1),
            Score(self.name, "BLEU-4", bleu, None, None, count),
        )
        rows = tuple(
            GalleryRow(known[i], pictures.thumbnail(i), (shown[i],), ("",), (exact[i],))
            for i in (j * count // self.gallery for j in range(min(self.gallery, count)))
        )
        return TaskResult(scores, (Gallery(f"{self.name}: captions", rows),) if rows else ())


def write_captions(
    pictures: PictureSet, encoder: Encoder, objective: str, num_beams: int, **choice: Unpack[Choice]
) -> list[str]:
    """A generated caption for every picture, in order, equal on every replica.

    Args:
        pictures: The pictures or clips.
        encoder: A stage with the objective's head.
        objective: Key of the objective.
        num_beams: 1 decodes greedily.
        choice: See ``SearchOptions``.

    Raises:
        UserError: The objective writes no texts, or ``min_length`` is larger than its texts can be.
    """
    writing = encoder.writing(objective)
    written = encoder.generate(objective, pictures, writing_search(writing, num_beams, **choice))
    return [writing.tokenizer.decode(tokens) for tokens in written.tolist()]


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
