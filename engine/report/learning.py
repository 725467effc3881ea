"""The curves of a run, its stages one after the other: one chart, and what they have cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from engine.report.curves import PALETTE, empty_figure
from engine.telemetry.curve import CurvePoint, leading_names
from engine.telemetry.pace import duration
from omnivl.shown import chart_text


@dataclass(frozen=True)
class StageCurve:
    """The curve of a stage.

    Attributes:
        stage: The stage's name.
        steps_before: Optimizer steps of the stages before it.
        points: In their order.
    """

    stage: str
    steps_before: int
    points: Sequence[CurvePoint]


def learning_figure(curves: Sequence[StageCurve]) -> go.Figure:
    """The leading scores over the steps of the run, with chance dotted and the pixel baseline dashed."""
    figure = empty_figure("Scores by time, over the steps of the run", from_zero=True)
    for index, name in enumerate(leading_names(point for curve in curves for point in curve.points)):
        color = PALETTE[index % len(PALETTE)]
        _add(figure, curves, name, "", {"color": color, "width": 2})
        _add(figure, curves, name, "chance", {"color": color, "width": 1, "dash": "dot"})
        _add(figure, curves, name, "16x16 pixels", {"color": color, "width": 1, "dash": "dash"})
    for curve in curves[1:]:
        figure.add_vline(x=curve.steps_before, line={"color": "#9ca3af", "width": 1})
    for curve in curves:
        place = {"x": curve.steps_before, "y": 1.0, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(text=chart_text(curve.stage), showarrow=False, font={"size": 10}, **place)
    return figure


def _add(figure: go.Figure, curves: Sequence[StageCurve], name: str, what: str, line: Mapping[str, object]) -> None:
    """A score of all stages, or what chance or the pixels have beside it; nothing where it has no values."""
    places: list[int] = []
    values: list[float] = []
    for curve in curves:
        for point in curve.points:
            group = {"": point.scores, "chance": point.chance, "16x16 pixels": point.pixels}[what]
            if name in group:
                places.append(curve.steps_before + point.step)
                values.append(group[name])
    if values:
        label = f"{name}, {what}" if what else name
        mode = "lines" if what else "lines+markers"
        figure.add_scatter(x=places, y=values, mode=mode, name=chart_text(label), line=line)


def learning_text(curves: Sequence[StageCurve]) -> str:
    """How often was evaluated, on how much, and what it took of the time of training."""
    points = [point for curve in curves for point in curve.points]
    cost = sum(point.cost for point in points)
    trained = sum(curve.points[-1].seconds for curve in curves if curve.points)
    asked = sorted({count for point in points for count in point.queries.values()})
    queries = " to ".join(f"{count:,}" for count in dict.fromkeys(asked[:1] + asked[-1:]))
    share = f", {cost / trained:.1%} of the time of training".replace("%", " %") if trained > 0 else ""
    times = f"{len(points)} evaluation{'' if len(points) == 1 else 's'}"
    return f"{times} of {queries or 'no'} queries in {duration(cost)}{share}."
