"""The table of scores on the console."""

from collections.abc import Sequence

from rich.table import Table

from omnivl.evaluation.results import Score


def format_share(value: float | None) -> str:
    """A share with three decimals; a dash where there is none, more decimals where three would show zero."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.4f}"


def score_table(scores: Sequence[Score], title: str) -> Table:
    """Every score beside chance and the pixel baseline."""
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for heading in ("model", "chance", "16x16 pixels", "queries"):
        table.add_column(heading, justify="right")
    previous = ""
    for score in scores:
        table.add_row(
            score.task if score.task != previous else "",
            score.metric,
            format_share(score.value),
            format_share(score.chance),
            format_share(score.baseline),
            str(score.count),
            end_section=False,
        )
        previous = score.task
    return table
