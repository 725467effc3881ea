"""Figures of a sweep: each measure against each cost, with the fit of the loss and the Pareto front."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from engine.sweep.config import Sweep
from engine.sweep.fits import PowerLaw, front
from engine.sweep.tables import AGAINST, NOT_DETERMINED, costs_of, groups_of, law_of
from omnivl.shown import chart_text

_PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")


WIDTH, HEIGHT = 620, 480
"""Pixels of one chart, large enough to read at arm's length."""

_LETTERS = 14


def _measures(rows: pd.DataFrame) -> list[str]:
    scores = [name for name in rows.columns if name.startswith("score/") and rows[name].notna().any()]
    return ["loss", *scores]


def figures(sweep: Sweep, rows: pd.DataFrame) -> dict[str, list[go.Figure]]:
    """For each measure a figure against each cost, of runs that are complete.

    Args:
        sweep: The sweep.
        rows: From ``collect``.
    """
    if rows.empty:
        return {}
    costs = costs_of(rows)
    return {measure: [_figure(sweep, rows, against, measure) for against in costs] for measure in _measures(rows)}


def side_by_side(row: Sequence[go.Figure]) -> go.Figure:
    """One figure of several, two beside each other, for a picture."""
    columns = min(2, len(row))
    lines = -(-len(row) // columns)
    titles = [one.layout.title.text for one in row]
    whole = make_subplots(rows=lines, cols=columns, subplot_titles=titles, vertical_spacing=0.22 / lines)
    for place, one in enumerate(row):
        line, column = place // columns + 1, place % columns + 1
        for trace in one.data:
            whole.add_trace(trace, row=line, col=column)
            whole.data[-1].showlegend = place == 0 and trace.showlegend is not False
        whole.update_xaxes(one.layout.xaxis, row=line, col=column)
    whole.update_annotations(font={"size": _LETTERS + 2})
    size = {"width": WIDTH * columns, "height": HEIGHT * lines, "margin": {"l": 60, "r": 16, "t": 60, "b": 60}}
    return whole.update_layout(
        template="plotly_white", font={"size": _LETTERS}, legend={"orientation": "h", "y": -0.12 / lines}, **size
    )


def _figure(sweep: Sweep, rows: pd.DataFrame, against: str, measure: str) -> go.Figure:
    figure, undetermined = go.Figure(), []
    for color, (name, part) in zip(itertools.cycle(_PALETTE), groups_of(sweep, rows).items(), strict=False):
        figure.add_scatter(
            x=part[against],
            y=part[measure],
            mode="markers",
            name=chart_text(name),
            text=[chart_text(run) for run in part["run"]],
            marker={"color": color, "size": 10},
        )
        if measure != "loss":
            continue
        points, law = law_of(part, against)
        if law is None:
            undetermined.append(name)
        else:
            _draw_law(figure, law, points[against], color)
        if against == "flops":
            best = part.iloc[front(list(part[against]), list(part[measure]))]
            line = {"color": color, "dash": "dot", "width": 1}
            figure.add_scatter(
                x=best[against], y=best[measure], mode="lines", line=line, name=f"{chart_text(name)}: front"
            )
    title = chart_text(f"{measure.removeprefix('score/')} against {AGAINST[against]}")
    if undetermined:
        title += f"<br><sub>fit {NOT_DETERMINED}: {chart_text(', '.join(undetermined))}</sub>"
    figure.update_layout(
        title={"text": title, "font": {"size": _LETTERS + 2}, "x": 0},
        height=HEIGHT,
        margin={"l": 64, "r": 16, "t": 64, "b": 48},
        xaxis={"type": "log", "title": {"text": AGAINST[against], "standoff": 4}, "exponentformat": "power"},
        font={"size": _LETTERS},
        template="plotly_white",
        showlegend=True,
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
    )
    return figure


def _draw_law(figure: go.Figure, law: PowerLaw, x: "pd.Series[float]", color: str) -> None:
    steps = np.geomspace(x.min(), x.max(), 60)
    middle, half = law.at(steps), law.band(steps)
    around = [*steps, *steps[::-1]]
    edge = [*(middle + half), *(middle - half)[::-1]]
    filled = {"fill": "toself", "fillcolor": color, "opacity": 0.12, "line": {"width": 0}}
    figure.add_scatter(x=around, y=edge, hoverinfo="skip", showlegend=False, mode="lines", **filled)
    figure.add_scatter(x=steps, y=middle, mode="lines", line={"color": color, "width": 2}, showlegend=False)
