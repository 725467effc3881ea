"""Retrieval between pictures or clips and texts, both ways, optionally re-ranked by a matching head."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.ranges import Range
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.parts.similarity import similarity as cosines
from omnivl.tasks.needs import Embeddings, Need, ScoresPairs
from omnivl.tasks.pixel_baseline import BaselineReference, pixels_of
from omnivl.tasks.predicting import KeepingTask
from omnivl.tasks.ranking import LOWER_RANKS, first_texts, found_galleries, metrics_of, scores_of_ranks
from omnivl.tasks.reranking import matching_of_texts, reranked
from omnivl.tasks.results import Score, TaskResult
from omnivl.tasks.scorers.recall import (
    LARGEST_BLOCK,
    Floats,
    Ranked,
    Relevance,
    Rows,
    folds_of,
    ranks_both_ways,
    ranks_of,
)

_RERANKED = ", re-ranked"


@dataclass(frozen=True)
class RetrievalTask(KeepingTask):
    """Retrieval both ways between pictures or clips and texts, with R@1, R@5, R@10 and the median rank.

    Attributes:
        text: ``caption``: the first caption of each picture; ``captions``: all of them, as published figures on COCO
            and Flickr30K have it (five a picture): a picture is found at the best of its captions, and each caption
            is a query; ``tags``: every tag of at least ``min_tagged`` pictures, relevant to all of them.
        min_tagged: See ``text``.
        folds: Pictures of a fold: the figures of folds of the set, each ranked by itself, averaged, beside those of
            the whole. 1000 for COCO's "1K" figures on 5,000 pictures; 0 for none.
        rerank: Number of contrastive candidates that the matching head re-ranks, in both directions and in folds; both
            rankings are reported. 0 for none.
        matcher: Key of the objective with that head.
        rerank_temperature: Divisor of the cosine before the matching log odds are added.
        baseline: Reference of the pixel baseline; null prints none. Needs ``text: caption``.
        gallery: Number of queries to keep for the report.
    """

    lower_is_better: ClassVar[tuple[str, ...]] = LOWER_RANKS

    kind: Literal["retrieval"] = "retrieval"
    text: Literal["caption", "captions", "tags"] = "caption"
    min_tagged: Annotated[int, Range(1)] = 2
    folds: Annotated[int, Range(0)] = 0
    rerank: Annotated[int, Range(0)] = 0
    matcher: str = "vlm"
    rerank_temperature: Annotated[float, Range(above=0)] = 0.07
    baseline: BaselineReference | None = None
    gallery: Annotated[int, Range(0)] = 0

    @property
    def needs(self) -> tuple[Need, ...]:
        """Embeddings, and the matching head for re-ranking."""
        return (
            (Embeddings(), ScoresPairs(self.matcher, option="rerank", without=0))
            if self.rerank > 0
            else (Embeddings(),)
        )

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        whole = [*self._directions(""), *(self._directions(_RERANKED) if self.rerank else ())]
        folded = [f"{one}{self._folded}" for one in whole] if self.folds else []
        return tuple(metric for one in (*whole, *folded) for metric in metrics_of(one))

    def _directions(self, how: str) -> tuple[str, str]:
        return f"{self.media}->text{how}", f"text->{self.media}{how}"

    @property
    def _folded(self) -> str:
        return f", folds of {self.folds}"

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
        """Ranks all texts for every picture and all pictures for every text.

        Raises:
            DataError: The pictures cannot be cut into folds.
        """
        pictures = self.picture_set(encoder)
        texts, relevance = _texts_and_relevance(pictures, self)
        folds = folds_of(len(pictures), self.folds) if self.folds else []
        shown, said = encoder.pictures(pictures), encoder.texts(texts)
        relevance = replace(relevance, per_value=shown.shape[1] if shown.dim() == 3 else 1)
        whole = _Compared(pictures, texts, shown, said, relevance)
        beside: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        if self.baseline is not None:
            beside = ranks_both_ways(_pixel_similarity(pictures, texts, self.baseline, encoder), relevance)
        ranked = self._rankings(whole, encoder)
        scores = self._scores([whole], [ranked], "", beside)
        if folds:
            parts = [whole.within(fold) for fold in folds]
            scores += self._scores(parts, [self._rankings(part, encoder) for part in parts], self._folded)
        of_pictures, of_texts = ranked[-1]
        galleries = found_galleries(
            self.name, self.media, pictures, texts, relevance, (of_pictures, of_texts), self.gallery
        )
        return TaskResult(tuple(scores), galleries, self.kept(pictures, first_texts(texts, of_pictures, relevance)))

    def _rankings(self, compared: "_Compared", encoder: Encoder) -> list[tuple[Rows, Rows]]:
        """Similarities from pictures to texts and from texts to pictures; those that are re-ranked come last."""
        found: list[tuple[Rows, Rows]] = [(compared.of_pictures, compared.of_texts)]
        if self.rerank:
            given, limits = (self.matcher, compared.pictures, compared.texts), (self.rerank, self.rerank_temperature)
            of_texts = partial(matching_of_texts, encoder, *given)
            found.append(
                (
                    reranked(compared.of_pictures, compared.relevance, *limits, partial(encoder.predict, *given)),
                    reranked(compared.of_texts, compared.transposed, *limits, of_texts),
                )
            )
        return found

    def _scores(
        self,
        sets: Sequence["_Compared"],
        rankings: Sequence[Sequence[tuple[Rows, Rows]]],
        suffix: str,
        baseline: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    ) -> list[Score]:
        """The figures of sets of pictures, averaged over the sets."""
        owners = None
        if self.text == "captions":
            owners = [(place, own[0]) for place, one in enumerate(sets) for own in one.transposed.candidates]
        scores = []
        for number, how in enumerate(("", _RERANKED)[: len(rankings[0])]):
            to_text, to_picture = [], []
            for one, ranking in zip(sets, rankings, strict=True):
                of_pictures, of_texts = ranking[number]
                if how:
                    ranks = ranks_of(of_pictures, one.relevance), ranks_of(of_texts, one.transposed)
                else:  # one matrix, so that the directions agree to the last bit
                    ranks = ranks_both_ways(of_pictures, one.relevance)
                to_text.append(Ranked(ranks[0], one.relevance))
                to_picture.append(Ranked(ranks[1], one.transposed))
            beside = (None, None) if how or baseline is None else baseline
            for_text, for_picture = (f"{direction}{suffix}" for direction in self._directions(how))
            scores += scores_of_ranks(self.name, for_text, to_text, beside[0])
            scores += scores_of_ranks(self.name, for_picture, to_picture, beside[1], owners)
        return scores


@dataclass(frozen=True)
class _Compared:
    """Pictures and texts with their embeddings, and which belong together."""

    pictures: PictureSet
    texts: Sequence[str]
    shown: Tensor
    said: Tensor
    relevance: Relevance

    @cached_property
    def transposed(self) -> Relevance:
        return self.relevance.transposed()

    def of_pictures(self, part: slice) -> Floats:
        return cosines(self.shown[part], self.said).numpy()

    def of_texts(self, part: slice) -> Floats:
        return cosines(self.said[part], self.shown).numpy()

    def within(self, part: slice) -> "_Compared":
        """Some pictures with their texts alone."""
        relevance, kept = self.relevance.within(part)
        pictures = self.pictures.chosen(range(len(self.pictures))[part])
        return _Compared(pictures, [self.texts[i] for i in kept], self.shown[part], self.said[kept], relevance)


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

    def rows(part: slice) -> Floats:
        similarity = torch.full((part.stop - part.start, len(texts)), -torch.inf)
        few = max(1, LARGEST_BLOCK // max(1, len(there)))
        for own, block in zip(torch.split(shown[part], few), torch.split(similarity, few), strict=True):
            block.scatter_reduce_(1, column.expand(len(own), -1), -torch.cdist(own, there), "amax")
        return similarity.numpy()

    return rows
