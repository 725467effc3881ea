"""Tables of a sweep: power laws, comparisons at equal cost, scaling, the runs themselves."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from engine.sweep.config import Sweep
from engine.sweep.fits import PowerLaw, efficiency, fit_power_law

AGAINST: Mapping[str, str] = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "flops": "operations of training",
    "tokens": "tokens",
    "seconds": "seconds of steps",
}
"""Columns of costs, by their titles on the page."""

_SIZES = ("parameters", "active_parameters")

_EQUAL = 0.01
"""Share by which the tokens of equally long runs may differ, since the lengths of texts are random."""

_SPEED = ("processes", "batch", "samples_per_second", "mfu", "memory_gib", "seconds")
_EVERYTHING = "all runs"

NOT_DETERMINED = "not determined"
"""Stands where a fit is asked for and its points leave it open: too few, or a loss that does not fall clearly."""


def groups_of(sweep: Sweep, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs by the value of the axis that is compared."""
    if sweep.compare is None:
        return {_EVERYTHING: rows}
    return {str(value): part for value, part in rows.groupby(sweep.compare, sort=False)}


def costs_of(rows: pd.DataFrame) -> list[str]:
    """The costs that differ enough between the runs for a figure."""
    return [name for name in AGAINST if name in rows and rows[name].nunique() > 1]


def _fitted(rows: pd.DataFrame, against: str) -> pd.DataFrame:
    """The runs to which a law is fitted: against a size only the longest ones, which have equal tokens."""
    if against not in _SIZES or "tokens" not in rows:
        return rows
    return rows[rows["tokens"] >= (1 - _EQUAL) * rows["tokens"].max()]


def law_of(rows: pd.DataFrame, against: str) -> tuple[pd.DataFrame, PowerLaw | None]:
    """The runs to which a law of the loss against a cost is fitted, and the law; None if they do not determine it."""
    points = _fitted(rows, against)
    law = fit_power_law(points[against], points["loss"])
    return points, law if law is not None and law.determined else None


def power_laws(sweep: Sweep, rows: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The fits of the loss, in numbers; ``NOT_DETERMINED`` for those that the runs do not determine."""
    if rows.empty:
        return
    for name, part in groups_of(sweep, rows).items():
        for against in costs_of(part):
            points, law = law_of(part, against)
            shown = [NOT_DETERMINED] * 3
            if law is not None:
                values = (law.floor, law.scale, law.exponent)
                shown = [f"{value:.3g} ± {error:.2g}" for value, error in zip(values, law.errors, strict=True)]
            yield {"of": name, "against": AGAINST[against], "points": str(len(points))} | dict(
                zip(("floor", "scale", "exponent"), shown, strict=True)
            )


def at_equal_cost(sweep: Sweep, rows: pd.DataFrame) -> Iterator[dict[str, str]]:
    """The compared curves at equal operations and at equal time, where their ranges overlap."""
    if sweep.compare is None or rows.empty:
        return
    groups = groups_of(sweep, rows)
    for against in ("flops", "seconds"):
        least = max(part[against].min() for part in groups.values())
        most = min(part[against].max() for part in groups.values())
        laws = {name: fit_power_law(part[against], part["loss"]) for name, part in groups.items()}
        if least > most or all(law is None for law in laws.values()):
            continue
        cost = float(np.sqrt(least * most))
        for name, law in laws.items():
            loss = NOT_DETERMINED
            if law is not None and np.isfinite(band := law.band([cost])[0]):
                loss = f"{law.at([cost])[0]:.4f} ± {band:.2g}"
            yield {"of": name, "at": f"{cost:.3g} {AGAINST[against]}", "loss": loss}


def scaling(sweep: Sweep, rows: pd.DataFrame) -> list[dict[str, str]]:
    """Throughput by the number of processes, for runs that otherwise differ in their batch only.

    Strong scaling keeps the total batch constant, weak scaling the batch of each process. Efficiency is relative to
    linear scaling from the run with the fewest processes.
    """
    if rows.empty or rows["processes"].nunique() < 2:
        return []
    given = rows.assign(each=rows["batch"] / rows["processes"])
    # An axis whose values determine the number of processes is the one along which runs scale.
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


def run_table(sweep: Sweep, rows: pd.DataFrame) -> list[dict[str, str]]:
    """The runs, with the same columns for all."""
    wanted = ["run", "state", *sweep.axes, "parameters", "active_parameters", "flops", "tokens", "loss"]
    scores = [name for name in rows.columns if name.startswith("score/")]
    names = [name for name in (*wanted, *scores, *_SPEED, "why") if name in rows]
    return [{name: _shown(row[name]) for name in names} for row in rows.to_dict("records")]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{int(value):,}" if value >= 1e4 and value < 1e9 else f"{value:.4g}"
    return str(value)
