"""The table of docs/estimate.md: its rows, their errors, its text."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "estimate.md"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: Model, machines, batch.
        figure: What is compared.
        published: The published value.
        estimated: The estimate.
        note: How it ran, and what the estimate does not take into account.
        is_run: Whether somebody trained so; otherwise operations alone are counted.
    """

    what: str
    figure: str
    published: float
    estimated: float
    note: str
    is_run: bool = True

    @property
    def error(self) -> float:
        """Estimate over published value, less 1."""
        return self.estimated / self.published - 1


def table(found: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| what | figure | published | estimated | error | |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.what} | {row.figure} | {row.published:,.0f} | {row.estimated:,.0f} | {row.error:+.0%} | {row.note} |"
        for row in found
    ]
    off = [abs(row.error) for row in found if row.is_run]
    alone = len(found) - len(off)
    said = "The row of counting alone is" if alone == 1 else f"The {alone} rows of counting alone are"
    within = sum(one <= 0.15 for one in off)
    lines += [
        "",
        f"The median error of the {len(off)} runs is {statistics.median(off):.0%}; {within} are within 15 %. "
        f"{said} not among them.",
    ]
    return "\n".join(lines)
