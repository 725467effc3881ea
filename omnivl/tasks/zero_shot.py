"""Zero-shot classification by prompts; on generated motion clips this is motion recognition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ranges import Range
from omnivl.data.templates import filled
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, Reads
from omnivl.tasks.examples import Told, example_gallery
from omnivl.tasks.needs import Embeddings, Need
from omnivl.tasks.pixel_baseline import BaselineReference, pixels_of
from omnivl.tasks.predicting import KeepingTask
from omnivl.tasks.results import TaskResult, evenly, mean_score
from omnivl.tasks.scorers.recall import LARGEST_BLOCK


@dataclass(frozen=True)
class ZeroShotTask(KeepingTask):
    """Zero-shot classification: the class with the nearest prompts. On ``motion`` clips this is motion recognition.

    Attributes:
        prompts: Templates with ``{label}``, averaged in embedding space (Source: CLIP, arXiv 2103.00020, 3.1.4). A
            template may contain ``{name}``, the sample's name: each sample then has its own class texts.
        baseline: Reference of the nearest-neighbour pixel baseline; null prints none.
        gallery: Number of samples to show in the report with their class, right or wrong, evenly spread over all
            samples; 0 for none.
    """

    reads: ClassVar[Reads] = "label"
    right_means: ClassVar[str] = "the class is the sample's own"

    kind: Literal["zero_shot"] = "zero_shot"
    prompts: tuple[str, ...] = ("{label}",)
    baseline: BaselineReference | None = None
    gallery: Annotated[int, Range(0)] = 12

    @property
    def needs(self) -> tuple[Need, ...]:
        """Embeddings of pictures and class texts."""
        return (Embeddings(),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return ("accuracy, * classes",)

    def run(self, encoder: Encoder) -> TaskResult:
        """Accuracy of the nearest class text.

        Raises:
            DataError: A sample has no label.
        """
        pictures = self.picture_set(encoder)
        labels = _labels(pictures)
        classes = sorted(set(labels))
        places = {label: place for place, label in enumerate(classes)}
        truth = torch.tensor([places[label] for label in labels])
        predicted = self._nearest(pictures, classes, encoder)
        score = mean_score(
            self.name,
            f"accuracy, {len(classes)} classes",
            (predicted == truth).numpy(),
            chance=1 / len(classes),
            baseline=None if self.baseline is None else _pixel_accuracy(self.baseline, pictures, labels, encoder),
        )
        found = [classes[place] for place in predicted.tolist()]
        lines = (({"label": one}, {"truth": own, "right": one == own}) for one, own in zip(found, labels, strict=True))
        chosen, right = evenly(len(pictures), self.gallery), (predicted == truth).tolist()
        told = [Told(found[place], labels[place]) for place in chosen]
        shown = example_gallery(self, pictures, chosen, [""] * len(chosen), told, right)
        return TaskResult((score,), shown, self.kept(pictures, lines))

    def examine(self, pictures: PictureSet) -> None:
        """See ``Task``: every sample has a label."""
        _labels(pictures)

    def _nearest(self, pictures: PictureSet, classes: list[str], encoder: Encoder) -> Tensor:
        """The class with the largest cosine of its templates' mean with each sample, int64 ``[samples]``.

        For a sample with several embeddings the largest counts.

        If a template contains ``{name}``, class texts depend on the sample; samples of one name share them.
        """
        own = [str(sample.meta.get("name", "")) for sample in pictures.samples]
        if not any("{name}" in prompt for prompt in self.prompts):
            own = [""] * len(own)
        names = sorted(set(own))
        by_name = class_embeddings(encoder, classes, self.prompts, names)
        places = {name: place for place, name in enumerate(names)}
        rows = torch.tensor([places[name] for name in own])
        found = encoder.pictures(pictures)
        several = found.shape[1] if found.dim() == 3 else 1
        size = max(1, LARGEST_BLOCK // (by_name.shape[1] * max(by_name.shape[2], several)))
        return torch.cat(
            [
                class_cosines(few, by_name[row]).argmax(dim=1)
                for few, row in zip(torch.split(found, size), torch.split(rows, size), strict=True)
            ]
        )


def class_embeddings(
    encoder: Encoder, classes: Sequence[str], prompts: Sequence[str], names: Sequence[str] = ("",)
) -> Tensor:
    """The L2-normalised mean of the prompts' embeddings for each class, fp32 ``[names, classes, P]``.

    Args:
        encoder: The trained stage.
        classes: What stands for ``{label}``.
        prompts: Templates.
        names: What stands for ``{name}``.
    """
    texts = [
        filled(prompt, {"label": label, "name": name}) for name in names for label in classes for prompt in prompts
    ]
    embeddings = encoder.texts(texts).view(len(names), len(classes), len(prompts), -1)
    return F.normalize(embeddings.mean(dim=2), dim=-1)


def class_cosines(pictures: Tensor, classes: Tensor) -> Tensor:
    """Cosines of pictures with their classes, fp32 ``[N, C]``.

    Args:
        pictures: ``[N, P]``, or ``[N, M, P]``, of which the largest counts.
        classes: Of each picture, or ``[1, C, P]`` for all: ``[N, C, P]``.
    """
    several = pictures if pictures.dim() == 3 else pictures[:, None]
    return torch.einsum("smp,scp->scm", several, classes.expand(len(several), -1, -1)).amax(-1)


def _labels(pictures: PictureSet) -> list[str]:
    labels = []
    for sample in pictures.samples:
        if sample.label is None:
            raise DataError(f"{sample.where} has no label: zero-shot classification needs one; filter with `where`")
        labels.append(sample.label)
    return labels


def _pixel_accuracy(reference: BaselineReference, pictures: PictureSet, labels: list[str], encoder: Encoder) -> float:
    """Accuracy of the label of the nearest reference picture, all frames compared."""
    known = reference.picture_set(encoder, ZeroShotTask.reads)
    known_labels = _labels(known)
    there = pixels_of(encoder, known)
    blocks = torch.split(pixels_of(encoder, pictures), max(1, LARGEST_BLOCK // len(there)))
    nearest = [place for block in blocks for place in torch.cdist(block, there).argmin(dim=1).tolist()]
    hits: int = sum(known_labels[j] == label for j, label in zip(nearest, labels, strict=True))
    return hits / len(labels)
