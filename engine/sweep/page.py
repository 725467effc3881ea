"""The page of a sweep: what its runs came to against size, data, operations and time, with fits."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.sweep.config import Sweep
from engine.sweep.fits import PowerLaw, efficiency, fit_power_law, front

_PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")
_AGAINST: Mapping[str, str] = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "flops": "operations of training",
    "tokens": "tokens",
    "seconds": "seconds of steps",
}
_SPEED = ("processes", "batch", "samples_per_second", "mfu", "memory_gib", "seconds")
_EVERYTHING = "all runs"


def write_sweep_page(sweep: Sweep, rows: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Writes ``sweep.parquet`` and ``sweep.html``.

    Args:
        sweep: What was wanted.
        rows: From ``collect``.
        folder: Where to.

    Returns:
        The page and the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "sweep.parquet", folder / "sweep.html"
    rows.to_parquet(table)
    complete = rows[rows["state"] == "complete"]
    templates = Environment(
        loader=PackageLoader("engine.sweep"), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    page.write_text(
        templates.get_template("sweep.html.j2").render(
            sweep=sweep,
            counts=rows["state"].value_counts().to_dict(),
            figures=[_html(figure) for figure in _figures(sweep, complete)],
            laws=list(_laws(sweep, complete)),
            equal=list(_at_equal_cost(sweep, complete)),
            scaling=scaling(sweep, complete),
            columns=_columns(sweep, rows),
            rows=[{name: _shown(value) for name, value in row.items()} for row in rows.to_dict("records")],
            plotly=Markup(get_plotlyjs()),
        ),
        encoding="utf-8",
    )
    return page, table


def groups_of(sweep: Sweep, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs by the value of the axis that is compared."""
    if sweep.compare is None:
        return {_EVERYTHING: rows}
    return {str(value): part for value, part in rows.groupby(sweep.compare, sort=False)}


def _against(rows: pd.DataFrame) -> list[str]:
    """What differs enough between the runs to be drawn against."""
    return [name for name in _AGAINST if name in rows and rows[name].nunique() > 1]


def _measures(rows: pd.DataFrame) -> list[str]:
    scores = [name for name in rows.columns if name.startswith("score/") and rows[name].notna().any()]
    return ["loss", *scores]


def _figures(sweep: Sweep, rows: pd.DataFrame) -> Iterator[go.Figure]:
    if rows.empty:
        return
    for measure in _measures(rows):
        for against in _against(rows):
            yield _figure(sweep, rows, against, measure)


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
        if (law := fit_power_law(part[against], part[measure])) is not None:
            _draw_law(figure, law, part[against], color)
        if against == "flops":
            best = part.iloc[front(list(part[against]), list(part[measure]))]
            line = {"color": color, "dash": "dot", "width": 1}
            figure.add_scatter(x=best[against], y=best[measure], mode="lines", line=line, name=f"{name}: front")
    figure.update_layout(
        title={"text": f"{measure.removeprefix('score/')} against {_AGAINST[against]}", "font": {"size": 14}, "x": 0},
        margin={"l": 52, "r": 8, "t": 34, "b": 36},
        xaxis={"type": "log", "title": {"text": _AGAINST[against], "standoff": 4}, "exponentformat": "power"},
        font={"size": 11},
        template="plotly_white",
        showlegend=True,
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
    )
    return figure


def _draw_law(figure: go.Figure, law: PowerLaw, x: "pd.Series[float]", color: str) -> None:
    steps = np.geomspace(x.min(), x.max(), 60)
    middle, half = law.at(steps), law.band(steps)
    if np.isfinite(half).all():
        around = [*steps, *steps[::-1]]
        edge = [*(middle + half), *(middle - half)[::-1]]
        filled = {"fill": "toself", "fillcolor": color, "opacity": 0.12, "line": {"width": 0}}
        figure.add_scatter(x=around, y=edge, hoverinfo="skip", showlegend=False, mode="lines", **filled)
    figure.add_scatter(x=steps, y=middle, mode="lines", line={"color": color, "width": 2}, showlegend=False)


def _laws(sweep: Sweep, rows: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The fits of the loss, in numbers."""
    if rows.empty:
        return
    for name, part in groups_of(sweep, rows).items():
        for against in _against(part):
            law = fit_power_law(part[against], part["loss"])
            if law is not None:
                values = (law.floor, law.scale, law.exponent)
                shown = [f"{value:.3g} ± {error:.2g}" for value, error in zip(values, law.errors, strict=True)]
                yield {"of": name, "against": _AGAINST[against], "points": str(law.points)} | dict(
                    zip(("floor", "scale", "exponent"), shown, strict=True)
                )


def _at_equal_cost(sweep: Sweep, rows: pd.DataFrame) -> Iterator[dict[str, str]]:
    """What each of the compared comes to at the same operations, and in the same time: where their ranges overlap."""
    if sweep.compare is None or rows.empty:
        return
    groups = groups_of(sweep, rows)
    for against in ("flops", "seconds"):
        least = max(part[against].min() for part in groups.values())
        most = min(part[against].max() for part in groups.values())
        laws = {name: fit_power_law(part[against], part["loss"]) for name, part in groups.items()}
        if least > most or any(law is None for law in laws.values()):
            continue
        cost = float(np.sqrt(least * most))
        for name, law in laws.items():
            assert law is not None
            loss = f"{law.at([cost])[0]:.4f} ± {law.band([cost])[0]:.2g}"
            yield {"of": name, "at": f"{cost:.3g} {_AGAINST[against]}", "loss": loss}


def scaling(sweep: Sweep, rows: pd.DataFrame) -> list[dict[str, str]]:
    """Throughput by the number of processes, of runs that differ in nothing else but their batch.

    Strong scaling holds the batch of all processes together, weak scaling that of each. Efficiency is over what the run
    with the fewest processes would give at perfect scaling.
    """
    if rows.empty or rows["processes"].nunique() < 2:
        return []
    given = rows.assign(each=rows["batch"] / rows["processes"])
    # An axis by whose value the number of processes is known is the one along which runs scale.
    others = [axis for axis in sweep.axes if rows.groupby(axis)["processes"].nunique().max() > 1]
    found = []
    for kind, held in (("strong", "batch"), ("weak", "each")):
        for _, part in given.groupby([*others, "parameters", held], sort=False):
            means = part.groupby("processes", as_index=False)["samples_per_second"].mean()
            if len(means) < 2:
                continue
            rates = efficiency(list(means["processes"]), list(means["samples_per_second"]))
            first = part.iloc[0]
            fixed = {axis: str(first[axis]) for axis in others} | {"parameters": f"{first['parameters']:,}"}
            for (_, row), share in zip(means.iterrows(), rates, strict=True):
                batch = first["batch"] if kind == "strong" else first["each"] * row["processes"]
                found.append(
                    {"scaling": kind, **fixed, "processes": str(int(row["processes"])), "batch": str(round(batch))}
                    | {"samples/s": f"{row['samples_per_second']:.1f}", "efficiency": f"{share:.2f}"}
                )
    return found


def _columns(sweep: Sweep, rows: pd.DataFrame) -> list[str]:
    wanted = ["run", "state", *sweep.axes, "parameters", "active_parameters", "flops", "tokens", "loss"]
    scores = [name for name in rows.columns if name.startswith("score/")]
    return [name for name in (*wanted, *scores, *_SPEED, "why") if name in rows]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{int(value):,}" if value >= 1e4 and value < 1e9 else f"{value:.4g}"
    return str(value)


def _html(figure: go.Figure) -> Markup:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    written = figure.to_html(
        full_html=False, include_plotlyjs=False, config=config, default_width="100%", default_height="340px"
    )
    return Markup(written)
