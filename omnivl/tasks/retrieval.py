"""Retrieval between pictures or clips and texts, both ways, optionally re-ranked by the alignment decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from omnivl.tasks.config import BaselineReference, RetrievalTask
from omnivl.tasks.encoder import Encoder
from omnivl.tasks.pictures import PictureSet
from omnivl.tasks.ranking import chance_recall_at, recalls
from omnivl.tasks.results import Gallery, GalleryRow, Score, TaskResult

PLACES = (1, 5, 10)


def evaluate_retrieval(task: RetrievalTask, encoder: Encoder) -> TaskResult:
    """Runs the task. Called by every replica in the same order."""
    pictures = PictureSet(task.source, task.media, task.where, encoder.model.inputs, task.max_samples)
    texts, relevant = _texts_and_relevance(pictures, task)
    similarity = encoder.pictures(pictures) @ encoder.texts(texts).T
    baseline = _pixel_similarity(pictures, texts, task.baseline, encoder) if task.baseline is not None else None
    scores = [
        *_scores(task, f"{task.media}->text", similarity, relevant, baseline),
        *_scores(task, f"text->{task.media}", similarity.T, relevant.T, None if baseline is None else baseline.T),
    ]
    ranked = similarity
    if task.rerank:
        ranked = _reranked(task, similarity, pictures, texts, encoder)
        scores += _scores(task, f"{task.media}->text, re-ranked", ranked, relevant, None)
    galleries = _galleries(task, pictures, texts, ranked, relevant) if task.gallery else ()
    return TaskResult(tuple(scores), galleries)


def _texts_and_relevance(pictures: PictureSet, task: RetrievalTask) -> tuple[list[str], Tensor]:
    """Distinct texts and which pictures each belongs to, bool ``[pictures, texts]``."""
    owned: list[set[str]]
    if task.text == "caption":
        owned = [{caption} for caption in pictures.captions]
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


def _scores(
    task: RetrievalTask, direction: str, similarity: Tensor, relevant: Tensor, baseline: Tensor | None
) -> list[Score]:
    found = recalls(similarity, relevant, PLACES)
    pixels = recalls(baseline, relevant, PLACES) if baseline is not None else {}
    return [
        Score(task.name, f"{direction} R@{k}", found[k], chance_recall_at(relevant, k), pixels.get(k), len(relevant))
        for k in PLACES
    ]


def _pixel_similarity(
    pictures: PictureSet, texts: Sequence[str], reference: BaselineReference, encoder: Encoder
) -> Tensor:
    """What 16x16 pixels say: a text is stood for by the reference pictures that have it as their first caption.

    Returns:
        fp32 ``[pictures, texts]``: minus the smallest distance to a reference picture of that text; texts without one
        rank last.
    """
    known = PictureSet(reference.source, reference.media, reference.where, encoder.model.inputs, reference.max_samples)
    columns = {text: i for i, text in enumerate(texts)}
    distances = torch.cdist(encoder.pixels(pictures, over_time=True), encoder.pixels(known, over_time=True))
    similarity = torch.full((len(pictures), len(texts)), -torch.inf)
    for row, caption in enumerate(known.captions):
        if caption in columns:
            column = columns[caption]
            similarity[:, column] = torch.maximum(similarity[:, column], -distances[:, row])
    return similarity


def _reranked(
    task: RetrievalTask, similarity: Tensor, pictures: PictureSet, texts: Sequence[str], encoder: Encoder
) -> Tensor:
    """The first texts of each picture in the order of matching log odds plus cosine over temperature.

    The others keep their order behind them.

    Source: ALBEF, arXiv 2107.07651, section 6.1 (re-ranking by matching score); BLIP, arXiv 2201.12086 (its code adds
        the similarity).
    Differs: the cosine is divided by a temperature, which puts it on the scale of log odds.
    """
    values, candidates = similarity.topk(min(task.rerank, len(texts)), dim=1)
    score = encoder.match(pictures, texts, candidates) + values / task.rerank_temperature
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
