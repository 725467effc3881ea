"""Curves of a stage from its metrics file, as Plotly figures: one panel per unit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from engine.telemetry.metrics import read_metrics

Record = dict[str, float]

_PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")
_NOT_DRAWN = ("step", "skipped")


@dataclass(frozen=True)
class Panel:
    """Figures that share a unit.

    Attributes:
        title: Heads the panel.
        pattern: Names of the figures, ``group/name``. The first panel that matches a figure takes it.
        labels: Labels of figures whose name is not clear enough.
        from_zero: Whether the axis starts at zero.
    """

    title: str
    pattern: str
    labels: Mapping[str, str]
    from_zero: bool = False


PANELS: tuple[Panel, ...] = (
    Panel("Losses", r"losses/.*|loss", {"loss": "weighted total"}),
    Panel("Accuracy within the batch", r"metrics/.*(accuracy|_r\d+)", {}, from_zero=True),
    Panel("Temperature", r"metrics/.*temperature", {}),
    Panel("Positives per query", r"metrics/.*positives", {}),
    Panel("Shares of the batch", r"metrics/.*(fraction|with_negative|queue_valid)", {}, from_zero=True),
    Panel("Experts used", r"metrics/router/experts_used_.*", {}, from_zero=True),
    Panel("Entropy of the routers, nats", r"metrics/router/entropy_.*", {}, from_zero=True),
    Panel("Weight of the first choice", r"metrics/router/confidence_.*", {}, from_zero=True),
    Panel("Share of choices dropped", r"metrics/router/dropped_.*", {}, from_zero=True),
    Panel("Experts used, by layer", r"metrics/router/.+/experts_used", {}, from_zero=True),
    Panel("Busiest expert over the mean, by layer", r"metrics/router/.+/largest_load", {}, from_zero=True),
    Panel("Entropy of the routers, nats, by layer", r"metrics/router/.+/entropy", {}, from_zero=True),
    Panel("Weight of the first choice, by layer", r"metrics/router/.+/confidence", {}, from_zero=True),
    Panel("Share of choices dropped, by layer", r"metrics/router/.+/dropped", {}, from_zero=True),
    Panel("Other metrics", r"metrics/.*", {}),
    Panel("Learning rate", r"lr/.*", {}),
    Panel("Gradient norm before clipping", r"gradient_norm", {"gradient_norm": "norm"}),
    Panel(
        "Samples per second", r"speed/samples_per_second", {"speed/samples_per_second": "all replicas"}, from_zero=True
    ),
    Panel("Tokens per second", r"speed/tokens_per_second", {"speed/tokens_per_second": "all replicas"}, from_zero=True),
    Panel("Seconds per step", r"speed/seconds_per_step", {"speed/seconds_per_step": "seconds"}, from_zero=True),
    Panel("TFLOP/s", r"speed/tflops", {"speed/tflops": "all replicas"}, from_zero=True),
    Panel(
        "Share of the peak, share of time",
        r"speed/(mfu|data_wait)",
        {"speed/mfu": "MFU (of peak)", "speed/data_wait": "waiting for data (of time)"},
        from_zero=True,
    ),
    Panel(
        "Seconds that checkpoints took",
        r"speed/save_seconds",
        {"speed/save_seconds": "from training, since the point before"},
        from_zero=True,
    ),
    Panel(
        "Memory per process, GiB",
        r"speed/(gpu_)?memory_gib",
        {"speed/memory_gib": "resident", "speed/gpu_memory_gib": "GPU, most so far"},
        from_zero=True,
    ),
    Panel("Other figures", r".*", {}),
)
"""Every figure of a training record is drawn in exactly one of these."""

_LEADING_SCORES = re.compile(r".*(R@1|accuracy.*|keyword F1)")


def training_records(path: Path) -> list[Record]:
    """The training lines of ``metrics.jsonl``, their groups flattened to ``group/name``."""
    return [_flat(record) for record in read_metrics(path) if record.get("event") == "train"]


def evaluation_records(path: Path) -> list[Record]:
    """The evaluations of ``metrics.jsonl``: the step, and the leading scores by ``task/metric``."""
    records = [record for record in read_metrics(path) if record.get("event") == "evaluation"]
    return [
        {"step": record["step"], **{name: v for name, v in record["scores"].items() if _LEADING_SCORES.fullmatch(name)}}
        for record in records
    ]


def panels_of(records: Sequence[Record]) -> list[tuple[Panel, tuple[str, ...]]]:
    """The panels that have something to draw, with the names of their figures."""
    left = sorted({name for record in records for name in record if name not in _NOT_DRAWN})
    found = []
    for panel in PANELS:
        taken = tuple(name for name in left if re.fullmatch(panel.pattern, name))
        left = [name for name in left if name not in taken]
        if taken:
            found.append((panel, taken))
    return found


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over ``window`` values; shorter at the start, so no value is invented."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def panel_figure(records: Sequence[Record], panel: Panel, names: Sequence[str]) -> go.Figure:
    """One line per figure of a panel, smoothed, over faint raw values."""
    figure = _empty_figure(panel.title, panel.from_zero)
    for index, name in enumerate(names):
        label = panel.labels.get(name, name.partition("/")[2] or name)
        _add_line(figure, records, name, label, index, smoothed=True)
    return figure


def scores_figure(records: Sequence[Record]) -> go.Figure:
    """The leading scores of each evaluation during a stage."""
    figure = _empty_figure("Scores while training", True)
    for index, name in enumerate(sorted({name for record in records for name in record if name != "step"})):
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


def _empty_figure(title: str, from_zero: bool) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98},
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
    color, window = _PALETTE[index % len(_PALETTE)], max(1, len(values) // 40) if smoothed else 1
    mode = "lines" if len(values) > 1 and smoothed else "lines+markers"
    if window > 1:
        raw = {"color": color, "width": 1}
        figure.add_scatter(x=steps, y=values, mode="lines", line=raw, opacity=0.25, showlegend=False, hoverinfo="skip")
    line = {"color": color, "width": 2}
    figure.add_scatter(x=steps, y=smooth(values, window), mode=mode, name=label, line=line)
