"""Captions written by the generation decoder: exact match, keyword F1, BLEU."""

import re

import sacrebleu
import torch

from omnivl.inference.generate import SearchOptions
from omnivl.tasks.config import CaptionTask
from omnivl.tasks.encoder import Encoder
from omnivl.tasks.pictures import PictureSet, shared_batches
from omnivl.tasks.results import Gallery, GalleryRow, Score, TaskResult

STOP_WORDS = frozenset({"a", "an", "the", "of", "with", "and", "in", "on", "to"})


def evaluate_captions(task: CaptionTask, encoder: Encoder) -> TaskResult:
    """Captions every sample and compares with all of its own captions. Called by every replica in the same order."""
    pictures = PictureSet(task.source, task.media, task.where, encoder.model.inputs, task.max_samples)
    written = write_captions(pictures, encoder, task.num_beams)
    references = [sample.captions for sample in pictures.samples]
    exact = [text in own for text, own in zip(written, references, strict=True)]
    f1 = [max(keyword_f1(text, one) for one in own) for text, own in zip(written, references, strict=True)]
    most = max(len(own) for own in references)
    padded = [[own[min(i, len(own) - 1)] for own in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(written, padded, lowercase=True).score / 100
    count = len(pictures)
    scores = (
        Score(task.name, "exact match", sum(exact) / count, None, None, count),
        Score(task.name, "keyword F1", sum(f1) / count, None, None, count),
        Score(task.name, "BLEU-4", bleu, None, None, count),
    )
    rows = tuple(
        GalleryRow(pictures.captions[i], pictures.thumbnail(i), (written[i],), ("",), (exact[i],))
        for i in (j * count // task.gallery for j in range(min(task.gallery, count)))
    )
    return TaskResult(scores, (Gallery(f"{task.name}: captions", rows),) if rows else ())


def write_captions(pictures: PictureSet, encoder: Encoder, num_beams: int) -> list[str]:
    """The caption of every picture, in order, equal on every replica."""
    special = encoder.tokenizer.special
    options = SearchOptions(
        start=special.decode,
        end=special.sep,
        pad=special.pad,
        banned=tuple(i for i in range(special.num_reserved) if i != special.sep),
        max_length=encoder.model.text_length - 1,
        num_beams=num_beams,
    )
    parts = []
    for indices in shared_batches(len(pictures), encoder.batch_size, encoder.gather):
        frames = pictures.frames(indices).to(encoder.device)
        parts.append(encoder.chain.generate(frames, options, gather=encoder.gather).token_ids)
    joined = encoder.gather.join(torch.cat(parts))[: len(pictures)]
    return [encoder.tokenizer.decode(tokens) for tokens in joined.tolist()]


def keywords(text: str) -> frozenset[str]:
    """The words of a text without articles and prepositions, lower-case."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - STOP_WORDS


def keyword_f1(written: str, reference: str) -> float:
    """Harmonic mean of precision and recall of keywords as sets; 0 where none is shared.

    ``2 |A & B| / (|A| + |B|)``: "red heart" against "black heart" is 2 * 1 / 4 = 0.5.
    """
    ours, theirs = keywords(written), keywords(reference)
    shared = len(ours & theirs)
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0
