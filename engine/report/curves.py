"""Curves of a stage from its metrics file, as Plotly figures: one panel per unit."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from engine.telemetry.metrics import read_metrics
from engine.telemetry.panels import Panel, figure_name, grouped, is_leading_score
from omnivl.shown import chart_text

Record = dict[str, float]

PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")


def training_records(path: Path) -> list[Record]:
    """The training lines of ``metrics.jsonl``, their groups flattened to ``group/name``."""
    records = [_flat(record) for record in read_metrics(path) if record.get("event") == "train"]
    return sorted(records, key=lambda record: record["step"])


def evaluation_records(path: Path) -> list[Record]:
    """The evaluations of ``metrics.jsonl``: the step, and the leading scores by ``task/metric``."""
    records = [record for record in read_metrics(path) if record.get("event") == "evaluation"]
    return [
        {"step": record["step"], **{name: v for name, v in record["scores"].items() if is_leading_score(name)}}
        for record in records
    ]


def panels_of(records: Sequence[Record]) -> list[tuple[Panel, tuple[str, ...]]]:
    """The panels that have something to draw, with the names of their figures."""
    return grouped(name for record in records for name in record)


def split_flat(records: Sequence[Record]) -> tuple[list[tuple[Panel, tuple[str, ...]]], dict[str, float]]:
    """The panels with the figures that change, and the figures that stay, which no chart needs.

    Returns:
        As ``panels_of``, without figures that stay and without panels that are empty then; and the value of each figure
        that stays, by its panel and name, such as ``Losses, router: z``.
    """
    drawn, flat = [], {}
    for panel, names in panels_of(records):
        if moving := tuple(name for name in names if changes(records, name)):
            drawn.append((panel, moving))
        for name in (name for name in names if name not in moving):
            flat[f"{panel.title}, {figure_name(name)}"] = next(record[name] for record in records if name in record)
    return drawn, flat


def changes(records: Iterable[Record], name: str) -> bool:
    """Whether a figure has more than one value, to four digits."""
    return len({f"{record[name]:.3e}" for record in records if name in record}) > 1


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over ``window`` values; shorter at the start, so no value is invented."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def panel_figure(records: Sequence[Record], panel: Panel, names: Sequence[str]) -> go.Figure:
    """One line per figure of a panel, smoothed, over faint raw values."""
    figure = empty_figure(panel.title, panel.from_zero)
    for index, name in enumerate(names):
        _add_line(figure, records, name, figure_name(name), index, smoothed=True)
    return figure


def scores_figure(records: Sequence[Record], names: Sequence[str]) -> go.Figure:
    """Scores of each evaluation during a stage."""
    figure = empty_figure("Scores while training", True)
    for index, name in enumerate(names):
        _add_line(figure, records, name, name, index, smoothed=False)
    return figure


def _flat(record: Mapping[str, Any]) -> Record:
    flat: Record = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


def empty_figure(title: str, from_zero: bool) -> go.Figure:
    """A chart over steps without lines; ``from_zero`` is whether its axis starts at zero."""
    figure = go.Figure()
    figure.update_layout(
        title={"text": chart_text(title), "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98},
        margin={"l": 44, "r": 8, "t": 34, "b": 28},
        xaxis={"title": {"text": "step", "standoff": 4}},
        yaxis={"exponentformat": "power", "nticks": 6, "rangemode": "tozero" if from_zero else "normal"},
        font={"size": 11},
        template="plotly_white",
        showlegend=True,
        legend={"orientation": "h", "y": -0.28, "yanchor": "top", "x": 0},
        hovermode="x unified",
    )
    return figure


def _add_line(
    figure: go.Figure, records: Iterable[Record], name: str, label: str, index: int, *, smoothed: bool
) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = [step for step, _ in points], [value for _, value in points]
    color, window = PALETTE[index % len(PALETTE)], max(1, len(values) // 40) if smoothed else 1
    mode = "lines" if len(values) > 1 and smoothed else "lines+markers"
    if window > 1:
        raw = {"color": color, "width": 1}
        figure.add_scatter(x=steps, y=values, mode="lines", line=raw, opacity=0.25, showlegend=False, hoverinfo="skip")
    line = {"color": color, "width": 2}
    figure.add_scatter(x=steps, y=smooth(values, window), mode=mode, name=chart_text(label), line=line)
