"""The table of scores on the console."""

from collections.abc import Sequence

from engine.telemetry.console import PlainTable
from omnivl.tasks.results import Score


def format_share(value: float | None) -> str:
    """A share with three decimals; a dash where there is none, more decimals where three would show zero."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.4f}"


def format_metric(score: Score) -> str:
    """The name of a metric, with an arrow behind it where a lower value is better."""
    return f"{score.metric} \N{DOWNWARDS ARROW}" if score.lower_is_better else score.metric


def format_interval(score: Score) -> str:
    """Half the width of a confidence interval, as ``±.012``; empty where there is none."""
    if score.interval is None:
        return ""
    low, high = score.interval
    half = f"{(high - low) / 2:.3f}"
    return f"±{half.removeprefix('0')}"


def score_table(scores: Sequence[Score], title: str) -> PlainTable:
    """Every score beside its confidence interval, chance and the pixel baseline; fits 80 columns with usual names."""
    table = PlainTable(title=title)
    table.add_column("task", vertical="top")
    table.add_column("metric")
    shown = any(score.interval is not None for score in scores)
    for heading in ("model", *(["95%"] if shown else []), "chance", "16x16\npixels", "queries"):
        table.add_column(heading, justify="right", vertical="bottom")
    previous = None
    for score in scores:
        if previous not in (None, score.task):
            table.add_section()
        table.add_row(
            score.task if score.task != previous else "",
            format_metric(score),
            format_share(score.value),
            *([format_interval(score)] if shown else []),
            format_share(score.chance),
            format_share(score.baseline),
            str(score.count),
        )
        previous = score.task
    return table
