"""Figures of a sweep: each measure against each cost, with the fit of the loss and the Pareto front."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from engine.sweep.config import Sweep
from engine.sweep.fits import PowerLaw, front
from engine.sweep.tables import AGAINST, costs_of, groups_of, law_of

_PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")


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
    """One figure of several, for a picture."""
    whole = make_subplots(rows=1, cols=len(row), subplot_titles=[one.layout.title.text for one in row])
    for column, one in enumerate(row, start=1):
        for trace in one.data:
            whole.add_trace(trace, row=1, col=column)
            whole.data[-1].showlegend = column == 1 and trace.showlegend is not False
        whole.update_xaxes(one.layout.xaxis, row=1, col=column)
    whole.update_annotations(font={"size": 11})
    layout = {"width": 300 * len(row), "height": 280, "margin": {"l": 40, "r": 8, "t": 28, "b": 36}}
    return whole.update_layout(
        template="plotly_white", font={"size": 10}, legend={"orientation": "h", "y": -0.3}, **layout
    )


def _figure(sweep: Sweep, rows: pd.DataFrame, against: str, measure: str) -> go.Figure:
    figure = go.Figure()
    for color, (name, part) in zip(_PALETTE, groups_of(sweep, rows).items(), strict=False):
        figure.add_scatter(
            x=part[against],
            y=part[measure],
            mode="markers",
            name=name,
            text=part["run"],
            marker={"color": color, "size": 8},
        )
        if measure != "loss":
            continue
        if (found := law_of(part, against)) is not None:
            points, law = found
            _draw_law(figure, law, points[against], color)
        if against == "flops":
            best = part.iloc[front(list(part[against]), list(part[measure]))]
            line = {"color": color, "dash": "dot", "width": 1}
            figure.add_scatter(x=best[against], y=best[measure], mode="lines", line=line, name=f"{name}: front")
    figure.update_layout(
        title={"text": f"{measure.removeprefix('score/')} against {AGAINST[against]}", "font": {"size": 14}, "x": 0},
        margin={"l": 52, "r": 8, "t": 34, "b": 36},
        xaxis={"type": "log", "title": {"text": AGAINST[against], "standoff": 4}, "exponentformat": "power"},
        font={"size": 11},
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
