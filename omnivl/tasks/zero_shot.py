"""Zero-shot classification by prompts; on generated motion clips this is motion recognition."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.tasks.needs import Embeddings, Need
from omnivl.tasks.pixel_baseline import BaselineReference, pixels_of
from omnivl.tasks.results import Score, TaskResult
from omnivl.tasks.task import Task


@dataclass(frozen=True)
class ZeroShotTask(Task):
    """Zero-shot classification: the class with the nearest prompts. On ``motion`` clips this is motion recognition.

    Attributes:
        prompts: Templates with ``{label}``, averaged in embedding space (Source: CLIP, arXiv 2103.00020, 3.1.4). A
            template may contain ``{name}``, the sample's name: each sample then has its own class texts.
        baseline: Reference of the nearest-neighbour pixel baseline; null prints none.
    """

    reads: ClassVar[Reads] = "label"

    kind: Literal["zero_shot"] = "zero_shot"
    prompts: tuple[str, ...] = ("{label}",)
    baseline: BaselineReference | None = None

    @property
    def needs(self) -> tuple[Need, ...]:
        """Embeddings of pictures and class texts."""
        return (Embeddings(),)

    def run(self, encoder: Encoder) -> TaskResult:
        """Accuracy of the nearest class text.

        Raises:
            DataError: A sample has no label.
        """
        pictures = self.pictures(encoder)
        labels = _labels(pictures)
        classes = sorted(set(labels))
        truth = torch.tensor([classes.index(label) for label in labels])
        predicted = self._similarity(pictures, classes, encoder).argmax(dim=1)
        score = Score(
            self.name,
            f"accuracy, {len(classes)} classes",
            float((predicted == truth).double().mean()),
            1 / len(classes),
            None if self.baseline is None else _pixel_accuracy(self.baseline, pictures, labels, encoder),
            len(pictures),
        )
        return TaskResult((score,))

    def _similarity(self, pictures: PictureSet, classes: list[str], encoder: Encoder) -> Tensor:
        """Cosine of each sample with the mean of each class's templates, fp32 ``[samples, classes]``.

        For a sample with several embeddings the largest counts.

        If a template contains ``{name}``, class texts depend on the sample; samples of one name share them.
        """
        own = [str(sample.meta.get("name", "")) for sample in pictures.samples]
        if not any("{name}" in prompt for prompt in self.prompts):
            own = [""] * len(own)
        names = sorted(set(own))
        texts = [
            prompt.replace("{label}", label).replace("{name}", name)
            for name in names
            for label in classes
            for prompt in self.prompts
        ]
        embeddings = encoder.texts(texts).view(len(names), len(classes), len(self.prompts), -1)
        by_name = F.normalize(embeddings.mean(dim=2), dim=-1)
        rows = torch.tensor([names.index(name) for name in own])
        found = encoder.pictures(pictures)
        several = found if found.dim() == 3 else found[:, None]
        return torch.einsum("smp,scp->scm", several, by_name[rows]).amax(-1)


def _labels(pictures: PictureSet) -> list[str]:
    labels = []
    for sample in pictures.samples:
        if sample.label is None:
            raise DataError(f"{sample.where} has no label: zero-shot classification needs one; filter with `where`")
        labels.append(sample.label)
    return labels


def _pixel_accuracy(reference: BaselineReference, pictures: PictureSet, labels: list[str], encoder: Encoder) -> float:
    """Accuracy of the label of the nearest reference picture, all frames compared."""
    known = reference.pictures(encoder, ZeroShotTask.reads)
    known_labels = _labels(known)
    nearest = torch.cdist(pixels_of(encoder, pictures), pixels_of(encoder, known)).argmin(dim=1).tolist()
    hits: int = sum(known_labels[j] == label for j, label in zip(nearest, labels, strict=True))
    return hits / len(labels)
