"""Galleries of samples with what was predicted of them: one path for all tasks that predict something."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from omnivl.inference.patch_attention import PatchAttention
from omnivl.inference.pictures import PictureSet
from omnivl.tasks.drawn import shown, with_attention
from omnivl.tasks.results import Drawing, Example, Gallery


@dataclass(frozen=True)
class Told:
    """What is said of one sample beside its picture and what was asked.

    Attributes:
        given: What was predicted.
        wanted: What is right.
        measure: How sure the model was, or how near it came; empty where nobody knows.
        drawing: The picture with what was found drawn into it; None: the plain one.
        marks: What is drawn into it, in the plural.
    """

    given: str
    wanted: str
    measure: str = ""
    drawing: Drawing | None = None
    marks: str = ""


class Shows(Protocol):
    """A task, as a gallery needs it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def right_means(self) -> str:
        """When a prediction is right."""


def example_gallery(
    task: Shows,
    pictures: PictureSet,
    places: Sequence[int],
    asked: Sequence[str],
    told: Sequence[Told],
    right: Sequence[bool],
    attention: PatchAttention | None = None,
    owners: Sequence[int] | None = None,
) -> tuple[Gallery, ...]:
    """The gallery of some predictions; none where there are none.

    Args:
        task: Whose predictions they are.
        pictures: All samples.
        places: The chosen ones among all predictions, G of them, in order.
        asked: The text that goes with each of the G; empty for none.
        told: What is said of each of the G.
        right: Of all predictions, whether they are.
        attention: Of the G texts.
        owners: The sample of each of all predictions; None: there is one of each sample.
    """
    examples = []
    for number, (place, text, one) in enumerate(zip(places, asked, told, strict=True)):
        own = place if owners is None else owners[place]
        seen = None
        if attention is not None:
            seen = with_attention(attention.pictures, number, attention.grids[number], attention.shares[number])
        drawing = shown(pictures, own) if one.drawing is None else one.drawing
        examples.append(Example(drawing, text, one.given, one.wanted, bool(right[place]), one.measure, seen))
    if not examples:
        return ()
    notes = [_chosen(examples, right, task.right_means), *([] if attention is None else [_attended(attention)])]
    return (Gallery(f"{task.name}: predictions", (), tuple(examples), tuple(notes), told[0].marks),)


def _chosen(examples: Sequence[Example], right: Sequence[bool], means: str) -> str:
    """How the samples were chosen, and how many are right."""
    some, hits = len(examples), sum(one.right for one in examples)
    if some == len(right):
        said = f"All {some} predictions: {hits} right, {some - hits} wrong."
    else:
        said = (
            f"{some} of {len(right):,} predictions, evenly spread in the order of the samples whatever the model says: "
            f"{hits} right, {some - hits} wrong; of all predictions {sum(map(bool, right)) / len(right):.1%} are right."
        )
    return f"{said} Right means: {means}."


def _attended(attention: PatchAttention) -> str:
    """What the attention is."""
    return (
        f"Attention: weights of the last layer that reads texts beside pictures, {attention.layer}, from "
        f"{attention.reader}, to the patches of what the model sees; mean over {attention.num_heads} heads, no "
        "gradients. Each picture from nothing (violet) to its own largest patch (yellow). It says where the model "
        "looked, not why it said what it said."
    )
