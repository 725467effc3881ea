"""What an evaluation returns: rows of a table, and galleries to look at."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        task: The task's name.
        metric: E.g. ``image->text R@1``.
        value: Share in [0, 1] unless the metric's name says otherwise.
        chance: What guessing would get; None where that has no meaning.
        baseline: What 16x16 pixels get; None where not asked for.
        count: Number of queries.
    """

    task: str
    metric: str
    value: float
    chance: float | None
    baseline: float | None
    count: int


@dataclass(frozen=True)
class GalleryRow:
    """One query with what came back.

    Attributes:
        query_text: Caption of the query, or the expected one.
        query_image: PNG as a data URI; empty for a text query.
        answer_texts: Best answers first.
        answer_images: PNGs as data URIs, or empty strings.
        correct: Which answers are right.
    """

    query_text: str
    query_image: str
    answer_texts: tuple[str, ...]
    answer_images: tuple[str, ...]
    correct: tuple[bool, ...]


@dataclass(frozen=True)
class Gallery:
    """Rows to look at in the report."""

    title: str
    rows: tuple[GalleryRow, ...]


@dataclass(frozen=True)
class TaskResult:
    """Everything one task produced."""

    scores: tuple[Score, ...]
    galleries: tuple[Gallery, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain containers, for ``evaluation.json``."""
        return asdict(self)
