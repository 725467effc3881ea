"""Retrieval between pictures or clips and texts, both ways, optionally re-ranked by a matching head."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.parts.similarity import similarity as cosines
from omnivl.tasks.needs import Embeddings, Head, Need
from omnivl.tasks.pixel_baseline import BaselineReference, pixels_of
from omnivl.tasks.ranking import (
    LARGEST_BLOCK,
    Relevance,
    Rows,
    best_rank,
    ranks_both_ways,
    recalls_both_ways,
    recalls_of,
    scores_of_ranks,
)
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

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return (*recalls_both_ways(self.media), *(recalls_of(f"{self.media}->text, re-ranked") if self.rerank else ()))

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a caption, or some of them have tags."""
        if self.text != "tags":
            super().examine(pictures)
        elif not any(_tags(sample.meta) for sample in pictures.samples):
            raise DataError(
                f"{pictures.samples[0].where} and others have no list 'tags', which text: tags ranks; set text to "
                "'caption', or filter with `where`"
            )

    def run(self, encoder: Encoder) -> TaskResult:
        """Ranks all texts for every picture and all pictures for every text."""
        pictures = self.picture_set(encoder)
        texts, relevance = _texts_and_relevance(pictures, self)
        shown, said = encoder.pictures(pictures), encoder.texts(texts)
        relevance = replace(relevance, per_value=shown.shape[1] if shown.dim() == 3 else 1)

        def similar(part: slice) -> Tensor:
            return cosines(shown[part], said)

        ranks, of_texts = ranks_both_ways(similar, relevance)
        counts, counts_of_texts = relevance.counts()
        beside: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.baseline is not None:
            pixels = _pixel_similarity(pictures, texts, self.baseline, encoder)
            beside = ranks_both_ways(pixels, relevance)
        scores = [
            *scores_of_ranks(self.name, f"{self.media}->text", ranks, counts, len(texts), beside[0]),
            *scores_of_ranks(self.name, f"text->{self.media}", of_texts, counts_of_texts, len(pictures), beside[1]),
        ]
        ranked: Rows = similar
        if self.rerank:
            ranked = _reranked(self, similar, relevance, pictures, texts, encoder)
            again = torch.cat([best_rank(ranked(part), relevance.rows(part)) for part in relevance.blocks()])
            scores += scores_of_ranks(self.name, f"{self.media}->text, re-ranked", again, counts, len(texts))
        galleries = _galleries(self, pictures, texts, ranked, relevance) if self.gallery else ()
        return TaskResult(tuple(scores), galleries)


def _texts_and_relevance(pictures: PictureSet, task: RetrievalTask) -> tuple[list[str], Relevance]:
    """Distinct texts, and which of them belong to each picture."""
    owned: list[set[str]]
    if task.text == "caption":
        owned = [{caption} for caption in pictures.captions]
    elif task.text == "captions":
        owned = [set(captions) for captions in pictures.all_captions]
    else:
        owned = [{str(tag) for tag in _tags(sample.meta)} for sample in pictures.samples]
        counts = Counter(tag for tags in owned for tag in tags)
        owned = [{tag for tag in tags if counts[tag] >= task.min_tagged} for tags in owned]
        keep = [i for i, tags in enumerate(owned) if tags]
        pictures.samples = [pictures.samples[i] for i in keep]
        owned = [owned[i] for i in keep]
    texts = sorted(set().union(*owned))
    columns = {text: i for i, text in enumerate(texts)}
    return texts, Relevance(tuple(tuple(sorted(columns[text] for text in own)) for own in owned), len(texts))


def _tags(meta: object) -> Sequence[object]:
    tags = meta.get("tags", ()) if isinstance(meta, dict) else ()
    return tags if isinstance(tags, list | tuple) else ()


def _pixel_similarity(
    pictures: PictureSet, texts: Sequence[str], reference: BaselineReference, encoder: Encoder
) -> Rows:
    """Similarity of pictures and texts by 16x16 pixels, over the reference pictures with the text as first caption.

    Returns:
        Rows of fp32 ``[pictures, texts]``: minus the smallest distance to a reference picture of that text; texts
        without one rank last.
    """
    known = reference.picture_set(encoder, "caption")
    columns = {text: i for i, text in enumerate(texts)}
    places = [(row, columns[caption]) for row, caption in enumerate(known.captions) if caption in columns]
    shown = pixels_of(encoder, pictures, over_time=True)
    there = pixels_of(encoder, known, over_time=True)[[row for row, _ in places]]
    column = torch.tensor([column for _, column in places], dtype=torch.long)

    def rows(part: slice) -> Tensor:
        similarity = torch.full((part.stop - part.start, len(texts)), -torch.inf)
        few = max(1, LARGEST_BLOCK // max(1, len(there)))
        for own, block in zip(torch.split(shown[part], few), torch.split(similarity, few), strict=True):
            block.scatter_reduce_(1, column.expand(len(own), -1), -torch.cdist(own, there), "amax")
        return similarity

    return rows


def _reranked(
    task: RetrievalTask,
    similar: Rows,
    relevance: Relevance,
    pictures: PictureSet,
    texts: Sequence[str],
    encoder: Encoder,
) -> Rows:
    """Re-ranks the first texts of each picture by matching log odds plus cosine over temperature.

    The others follow in their old order.

    Source: ALBEF, arXiv 2107.07651, section 6.1 (re-ranking by matching score); BLIP, arXiv 2201.12086 (its code adds
        the similarity).
    Differs: the cosine is divided by a temperature, which puts it on the scale of log odds.
    """
    blocks = [similar(part).topk(min(task.rerank, len(texts)), dim=1) for part in relevance.blocks()]
    values, candidates = torch.cat([one.values for one in blocks]), torch.cat([one.indices for one in blocks])
    score = encoder.predict(task.matcher, pictures, texts, candidates) + values / task.rerank_temperature
    behind = score.min() - 1.0 - values.max()

    def rows(part: slice) -> Tensor:
        return (similar(part) + behind).scatter(1, candidates[part], score[part])

    return rows


def _galleries(
    task: RetrievalTask, pictures: PictureSet, texts: Sequence[str], ranked: Rows, relevance: Relevance
) -> tuple[Gallery, ...]:
    """Evenly chosen queries of both directions with their first five answers."""
    chosen = [i * len(pictures) // task.gallery for i in range(min(task.gallery, len(pictures)))]
    columns = [i * len(texts) // task.gallery for i in range(min(task.gallery, len(texts)))]
    of_rows: dict[int, list[int]] = {}
    parts: list[Tensor] = []
    for part in relevance.blocks():
        block = ranked(part)
        parts.append(block[:, columns])
        for i in chosen:
            if part.start <= i < part.stop:
                of_rows[i] = block[i - part.start].topk(min(5, len(texts))).indices.tolist()
    of_columns = torch.cat(parts)
    from_pictures = tuple(
        GalleryRow(
            query_text=texts[relevance.candidates[i][0]],
            query_image=pictures.thumbnail(i),
            answer_texts=tuple(texts[j] for j in of_rows[i]),
            answer_images=("",) * len(of_rows[i]),
            correct=tuple(j in relevance.candidates[i] for j in of_rows[i]),
        )
        for i in chosen
    )
    from_texts = []
    for place, column in enumerate(columns):
        best = of_columns[:, place].topk(min(5, len(pictures))).indices.tolist()
        from_texts.append(
            GalleryRow(
                query_text=texts[column],
                query_image="",
                answer_texts=tuple(texts[relevance.candidates[i][0]] for i in best),
                answer_images=tuple(pictures.thumbnail(i) for i in best),
                correct=tuple(column in relevance.candidates[i] for i in best),
            )
        )
    return (
        Gallery(f"{task.name}: {task.media} to text", from_pictures),
        Gallery(f"{task.name}: text to {task.media}", tuple(from_texts)),
    )
