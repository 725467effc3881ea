"""Curves of a stage from its metrics file, as Plotly figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from engine.metrics import read_metrics

Record = dict[str, float]


def training_records(path: Path) -> list[Record]:
    """The training lines of ``metrics.jsonl``, their groups flattened to ``group/name``."""
    return [_flat(record) for record in read_metrics(path) if record.get("event") == "train"]


def _flat(record: Mapping[str, Any]) -> Record:
    flat: Record = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over ``window`` values; shorter at the start, so no value is invented."""
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result


def curves_figure(records: Sequence[Record], prefix: str, title: str) -> go.Figure:
    """One line per metric whose name starts with ``prefix``, against the step; faint raw values under smoothed ones."""
    names = sorted({name for record in records for name in record if name.startswith(prefix)})
    figure = go.Figure()
    palette = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")
    for i, name in enumerate(names):
        steps = [record["step"] for record in records if name in record]
        values = [record[name] for record in records if name in record]
        label, color = name.removeprefix(prefix), palette[i % len(palette)]
        window = max(1, len(values) // 40)
        figure.add_scatter(
            x=steps, y=values, line={"color": color, "width": 1}, opacity=0.25, showlegend=False, hoverinfo="skip"
        )
        figure.add_scatter(x=steps, y=smooth(values, window), name=label, line={"color": color, "width": 2})
    figure.update_layout(
        title=title,
        height=320,
        margin={"l": 48, "r": 16, "t": 44, "b": 36},
        xaxis_title="step",
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
        hovermode="x unified",
    )
    return figure
