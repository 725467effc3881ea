"""What a task makes of a scene, before anything is drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.world import Scene

T = TypeVar("T")

Numbers = int | Sequence["Numbers"]
"""Indices of things, nested as the boxes are wanted."""


@dataclass(frozen=True)
class Made:
    """A sample of a task without its pixels.

    Attributes:
        scenes: What is shown: one picture, or several named ``left`` and ``right``.
        captions: The sample's texts.
        fields: Its other fields.
        boxes: Fields that hold boxes of things of the first picture, by their indices there.
        mask: The thing whose mask is the file ``mask.png``; None for none.
    """

    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    fields: Mapping[str, object]
    boxes: Mapping[str, Numbers] = field(default_factory=dict)
    mask: int | None = None


Maker = Callable[[np.random.Generator, Cast], Made]
"""Makes a sample from a generator of its own; everything that is drawn comes from there."""


def pick(random: np.random.Generator, choices: Sequence[T]) -> T:
    """One of the choices."""
    return choices[int(random.integers(len(choices)))]


def shuffled(random: np.random.Generator, items: Sequence[T]) -> list[T]:
    """All items in random order."""
    return [items[place] for place in random.permutation(len(items)).tolist()]
