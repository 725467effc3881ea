"""The range of a number in a configuration, as a part of its annotation: ``steps: Annotated[int, Range(1)]``.

It is checked when a configuration is parsed (pydantic reads ``annotated_types``) and shown in the reference of plans.
Rules that compare two fields are functions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Le, Lt

AUTO = "auto"
"""Beside a ``Range`` in an annotation: the word may stand in the file too. Reading puts a number in its place."""


@dataclass(frozen=True)
class Range(GroupedMetadata):
    """The numbers between two bounds; None is no bound.

    Attributes:
        low: The smallest number.
        high: The largest number.
        above: All numbers are larger than this one.
        below: All numbers are smaller than this one.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __iter__(self) -> Iterator[BaseMetadata]:
        """The bounds, as pydantic knows them."""
        named: tuple[tuple[float | None, Callable[[float], BaseMetadata]], ...] = (
            (self.low, Ge),
            (self.high, Le),
            (self.above, Gt),
            (self.below, Lt),
        )
        for bound, limit in named:
            if bound is not None:
                yield limit(bound)

    def nearest(self, value: float) -> float | None:
        """``low`` or ``high`` for a number beyond it; None for every other number."""
        if self.low is not None and value < self.low:
            return self.low
        return self.high if self.high is not None and value > self.high else None

    def __str__(self) -> str:
        """The range in words: ``1 or more``, ``more than 0``, ``from 0 to 1``, ``at least 0 and less than 1``."""
        match self.low, self.high, self.above, self.below:
            case low, None, None, None if low is not None:
                return f"{low:g} or more"
            case low, high, None, None if low is not None and high is not None:
                return f"from {low:g} to {high:g}"
        words = {"at least": self.low, "more than": self.above, "at most": self.high, "less than": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
