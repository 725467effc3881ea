"""Zero-shot classification by prompts; on generated motion clips this is motion recognition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.errors import DataError
from omnivl.tasks.config import ZeroShotTask
from omnivl.tasks.encoder import Encoder
from omnivl.tasks.pictures import PictureSet
from omnivl.tasks.results import Score, TaskResult


def evaluate_zero_shot(task: ZeroShotTask, encoder: Encoder) -> TaskResult:
    """Accuracy of the nearest class text. Called by every replica in the same order.

    Raises:
        DataError: A sample has no label.
    """
    pictures = PictureSet(task.source, task.media, task.where, encoder.model.inputs, task.max_samples)
    labels = _labels(pictures)
    classes = sorted(set(labels))
    truth = torch.tensor([classes.index(label) for label in labels])
    predicted = _similarity(task, pictures, classes, encoder).argmax(dim=1)
    score = Score(
        task.name,
        f"accuracy, {len(classes)} classes",
        float((predicted == truth).double().mean()),
        1 / len(classes),
        _pixel_accuracy(task, pictures, labels, encoder) if task.baseline is not None else None,
        len(pictures),
    )
    return TaskResult((score,))


def _labels(pictures: PictureSet) -> list[str]:
    labels = []
    for sample in pictures.samples:
        if sample.label is None:
            raise DataError(f"{sample.where} has no label: zero-shot classification needs one; filter with `where`")
        labels.append(sample.label)
    return labels


def _similarity(task: ZeroShotTask, pictures: PictureSet, classes: list[str], encoder: Encoder) -> Tensor:
    """Cosine of each sample with the mean of each class's templates, fp32 ``[samples, classes]``.

    Where a template holds ``{name}``, every sample has class texts of its own; samples of one name share them.
    """
    own = [str(sample.meta.get("name", "")) for sample in pictures.samples]
    if not any("{name}" in prompt for prompt in task.prompts):
        own = [""] * len(own)
    names = sorted(set(own))
    texts = [
        prompt.replace("{label}", label).replace("{name}", name)
        for name in names
        for label in classes
        for prompt in task.prompts
    ]
    embeddings = encoder.texts(texts).view(len(names), len(classes), len(task.prompts), -1)
    by_name = F.normalize(embeddings.mean(dim=2), dim=-1)
    rows = torch.tensor([names.index(name) for name in own])
    return torch.einsum("sp,scp->sc", encoder.pictures(pictures), by_name[rows])


def _pixel_accuracy(task: ZeroShotTask, pictures: PictureSet, labels: list[str], encoder: Encoder) -> float:
    """Accuracy of the label of the nearest reference picture, all frames compared."""
    assert task.baseline is not None
    known = PictureSet(
        task.baseline.source, task.baseline.media, task.baseline.where, encoder.model.inputs, task.baseline.max_samples
    )
    known_labels = _labels(known)
    nearest = torch.cdist(encoder.pixels(pictures), encoder.pixels(known)).argmin(dim=1).tolist()
    hits: int = sum(known_labels[j] == label for j, label in zip(nearest, labels, strict=True))
    return hits / len(labels)
