"""Retrieval between pictures or clips and texts, both ways, optionally re-ranked by a matching head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.parts.similarity import similarity as cosines
from omnivl.tasks.needs import Embeddings, Head, Need
from omnivl.tasks.pixel_baseline import BaselineReference, pixels_of
from omnivl.tasks.ranking import recall_scores
from omnivl.tasks.results import Gallery, GalleryRow, TaskResult
from omnivl.tasks.task import Task


@dataclass(frozen=True)
class RetrievalTask(Task):
    """Retrieval in both directions between pictures or clips and texts, with R@1, R@5 and R@10.

    Attributes:
        text: ``caption``: the first caption of each picture; ``captions``: all of them, as published figures on COCO
            and Flickr30K have it (five a picture): a picture is found at the best of its captions, and each caption
            is a query; ``tags``: every tag of at least ``min_tagged`` pictures, relevant to all of them.
        min_tagged: See ``text``.
        rerank: Number of contrastive candidates that the matching head re-ranks; both rankings are reported. 0 for
            none.
        matcher: Key of the objective with that head.
        rerank_temperature: Divisor of the cosine before the matching log odds are added.
        baseline: Reference of the pixel baseline; null prints none. Needs ``text: caption``.
        gallery: Number of queries to keep for the report.
    """

    kind: Literal["retrieval"] = "retrieval"
    text: Literal["caption", "captions", "tags"] = "caption"
    min_tagged: Annotated[int, Range(1)] = 2
    rerank: Annotated[int, Range(0)] = 0
    matcher: str = "vlm"
    rerank_temperature: Annotated[float, Range(above=0)] = 0.07
    baseline: BaselineReference | None = None
    gallery: Annotated[int, Range(0)] = 0

    @property
    def needs(self) -> tuple[Need, ...]:
        """Embeddings, and the matching head for re-ranking."""
        return (Embeddings(), Head(self.matcher, option="rerank", without=0)) if self.rerank > 0 else (Embeddings(),)

    def run(self, encoder: Encoder) -> TaskResult:
        """Ranks all texts for every picture and all pictures for every text."""
        pictures = self.pictures(encoder)
        texts, relevant = _texts_and_relevance(pictures, self)
        similarity = cosines(encoder.pictures(pictures), encoder.texts(texts))
        pixels = None if self.baseline is None else _pixel_similarity(pictures, texts, self.baseline, encoder)
        scores = [
            *recall_scores(self.name, f"{self.media}->text", similarity, relevant, pixels),
            *recall_scores(
                self.name, f"text->{self.media}", similarity.T, relevant.T, None if pixels is None else pixels.T
            ),
        ]
        ranked = similarity
        if self.rerank:
            ranked = _reranked(self, similarity, pictures, texts, encoder)
            scores += recall_scores(self.name, f"{self.media}->text, re-ranked", ranked, relevant)
        galleries = _galleries(self, pictures, texts, ranked, relevant) if self.gallery else ()
        return TaskResult(tuple(scores), galleries)


def _texts_and_relevance(pictures: PictureSet, task: RetrievalTask) -> tuple[list[str], Tensor]:
    """Distinct texts and which pictures each belongs to, bool ``[pictures, texts]``."""
    owned: list[set[str]]
    if task.text == "caption":
        owned = [{caption} for caption in pictures.captions]
    elif task.text == "captions":
        owned = [set(captions) for captions in pictures.all_captions]
    else:
        owned = [{str(tag) for tag in _tags(sample.meta)} for sample in pictures.samples]
        counts = {tag: sum(tag in tags for tags in owned) for tag in sorted(set().union(*owned))}
        owned = [{tag for tag in tags if counts[tag] >= task.min_tagged} for tags in owned]
        keep = [i for i, tags in enumerate(owned) if tags]
        pictures.samples = [pictures.samples[i] for i in keep]
        owned = [owned[i] for i in keep]
    texts = sorted(set().union(*owned))
    columns = {text: i for i, text in enumerate(texts)}
    relevant = torch.zeros(len(owned), len(texts), dtype=torch.bool)
    for row, own in enumerate(owned):
        for text in own:
            relevant[row, columns[text]] = True
    return texts, relevant


def _tags(meta: object) -> Sequence[object]:
    tags = meta.get("tags", ()) if isinstance(meta, dict) else ()
    return tags if isinstance(tags, list | tuple) else ()


def _pixel_similarity(
    pictures: PictureSet, texts: Sequence[str], reference: BaselineReference, encoder: Encoder
) -> Tensor:
    """Similarity of pictures and texts by 16x16 pixels, over the reference pictures with the text as first caption.

    Returns:
        fp32 ``[pictures, texts]``: minus the smallest distance to a reference picture of that text; texts without one
        rank last.
    """
    known = reference.pictures(encoder)
    columns = {text: i for i, text in enumerate(texts)}
    distances = torch.cdist(pixels_of(encoder, pictures, over_time=True), pixels_of(encoder, known, over_time=True))
    similarity = torch.full((len(pictures), len(texts)), -torch.inf)
    for row, caption in enumerate(known.captions):
        if caption in columns:
            column = columns[caption]
            similarity[:, column] = torch.maximum(similarity[:, column], -distances[:, row])
    return similarity


def _reranked(
    task: RetrievalTask, similarity: Tensor, pictures: PictureSet, texts: Sequence[str], encoder: Encoder
) -> Tensor:
    """Re-ranks the first texts of each picture by matching log odds plus cosine over temperature.

    The others follow in their old order.

    Source: ALBEF, arXiv 2107.07651, section 6.1 (re-ranking by matching score); BLIP, arXiv 2201.12086 (its code adds
        the similarity).
    Differs: the cosine is divided by a temperature, which puts it on the scale of log odds.
    """
    values, candidates = similarity.topk(min(task.rerank, len(texts)), dim=1)
    score = encoder.predict(task.matcher, pictures, texts, candidates) + values / task.rerank_temperature
    behind = similarity - similarity.max() + score.min() - 1.0
    return behind.scatter(1, candidates, score)


def _galleries(
    task: RetrievalTask, pictures: PictureSet, texts: Sequence[str], similarity: Tensor, relevant: Tensor
) -> tuple[Gallery, ...]:
    """Evenly chosen queries of both directions with their first five answers."""
    rows = [i * len(pictures) // task.gallery for i in range(min(task.gallery, len(pictures)))]
    from_pictures = []
    for i in rows:
        best = similarity[i].topk(min(5, len(texts))).indices.tolist()
        own = texts[int(relevant[i].nonzero()[0])]
        from_pictures.append(
            GalleryRow(
                query_text=own,
                query_image=pictures.thumbnail(i),
                answer_texts=tuple(texts[j] for j in best),
                answer_images=("",) * len(best),
                correct=tuple(bool(relevant[i, j]) for j in best),
            )
        )
    from_texts = []
    for column in [i * len(texts) // task.gallery for i in range(min(task.gallery, len(texts)))]:
        best = similarity[:, column].topk(min(5, len(pictures))).indices.tolist()
        from_texts.append(
            GalleryRow(
                query_text=texts[column],
                query_image="",
                answer_texts=tuple(texts[int(relevant[i].nonzero()[0])] for i in best),
                answer_images=tuple(pictures.thumbnail(i) for i in best),
                correct=tuple(bool(relevant[i, column]) for i in best),
            )
        )
    return (
        Gallery(f"{task.name}: {task.media} to text", tuple(from_pictures)),
        Gallery(f"{task.name}: text to {task.media}", tuple(from_texts)),
    )
