"""Charts of the routing page as tables: bars and shaded cells, which need no script and can be read as numbers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.analysis import co_activation, expert_shares, profiles
from omnivl.tasks.routing.forced import Forced

COLOURS = {"image": "#2563eb", "video": "#7c3aed", "text": "#d97706"}
_LABELS, LABEL_SAMPLES, _LABEL_LETTERS = 15, 3, 22


@dataclass(frozen=True)
class Part:
    """A coloured part of a bar: what it stands for, and its width in percent of the longest bar."""

    name: str
    colour: str
    width: float


@dataclass(frozen=True)
class Bar:
    """A bar: its name, its parts and the number beside it."""

    name: str
    parts: tuple[Part, ...]
    text: str


@dataclass(frozen=True)
class Cell:
    """A shaded cell: its number, its shade from 0 to 1, and what it says in full."""

    text: str
    shade: float
    note: str


@dataclass(frozen=True)
class Chart:
    """Bars, or rows of shaded cells below the names of their columns.

    Attributes:
        title: Heads it.
        bars: Of a bar chart.
        across: What the columns are.
        columns: Their names.
        rows: Name of each row, its note, its cells.
    """

    title: str
    bars: tuple[Bar, ...] = ()
    across: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...] = ()


def percent(value: float, digits: int = 1) -> str:
    """A share in percent; ``-`` where there is none. What rounds to nothing is ``0``, never ``-0``."""
    return "-" if value != value else f"{round(100 * value, digits) + 0.0:.{digits}f}%"


def decimals(value: float, digits: int = 2) -> str:
    """A number; as ``percent``."""
    return "-" if value != value else f"{round(value, digits) + 0.0:.{digits}f}"


def used_chart(used: Any, num_experts: Mapping[str, int], forced: Forced) -> Chart:
    """Experts used by layer and modality, beside those that the modality may use."""
    bars = []
    for row in used.to_dict("records"):
        layer, modality, count = row["layer"], row["modality"], num_experts[row["layer"]]
        own = sum(forced.may(layer, modality, expert) for expert in range(count))
        width = 100 * row["experts_used"] / max(num_experts.values())
        said = f"{decimals(row['experts_used'])} of {own}" + (f" allowed, {count} in all" if own < count else "")
        bars.append(Bar(f"{layer}, {modality}", (Part(modality, COLOURS[modality], width),), said))
    return Chart("Experts used by modality", bars=tuple(bars))


def load_chart(tokens: Any, layer: str, num_experts: int) -> Chart:
    """The share of a layer's choices by expert and modality."""
    shares = expert_shares(tokens[tokens["layer"] == layer]).drop(columns="layer").set_index("expert")
    shares = shares.reindex(range(num_experts), fill_value=0)
    longest = max(float(shares["load"].max()), 1e-9)
    names = [name for name in COLOURS if name in shares]
    bars = tuple(
        Bar(
            f"expert {expert}",
            tuple(Part(name, COLOURS[name], 100 * float(row["load"] * row[name]) / longest) for name in names),
            percent(row["load"]),
        )
        for expert, row in shares.iterrows()
    )
    return Chart(f"{layer}: load by expert", bars=bars)


def by_expert_chart(experts: Any, column: str, title: str, num_experts: int) -> Chart:
    """A column of ``moe.analysis.expert_table`` by layer and expert."""
    found = experts.pivot(index="layer", columns="expert", values=column).reindex(columns=range(num_experts))
    most = max(float(np.nanmax(found.to_numpy())), 1e-9)
    rows = tuple((str(layer), "", _cells(values, most, f"{layer}, expert")) for layer, values in found.iterrows())
    return Chart(title, across="expert", columns=_numbers(num_experts), rows=rows)


def flow_charts(tokens: Any, num_experts: Mapping[str, int]) -> Iterator[Chart]:
    """Where the tokens of each expert go in the next layer, of layers that the same tokens pass."""
    for first, second in itertools.pairwise(tokens["layer"].cat.categories):
        found = co_activation(tokens, first, second)
        if found.empty:
            continue
        found = found.reindex(index=range(num_experts[first]), columns=range(num_experts[second]), fill_value=0.0)
        rows = tuple(
            (f"expert {expert}", "", _cells(row, 1.0, f"of expert {expert}, to expert"))
            for expert, row in found.iterrows()
        )
        yield Chart(
            f"From {first} to {second}", across=f"expert in {second}", columns=_numbers(num_experts[second]), rows=rows
        )


def label_chart(tokens: Any, layer: str, num_experts: int) -> Chart | None:
    """Experts of the labels that deviate most, below those of all patches; None if no label has enough patches."""
    own = tokens[(tokens["layer"] == layer) & (tokens["row"] >= 0) & (tokens["choice"] == 0) & tokens["label"].notna()]
    samples = own.groupby("label", observed=True)["sample"].nunique()
    often = own[own["label"].isin(samples.index[samples >= LABEL_SAMPLES])]
    found = profiles(often, layer, count=_LABELS)
    if found.empty:
        return None
    mean = own["expert"].value_counts(normalize=True).reindex(range(num_experts), fill_value=0.0)
    shares = found.reindex(columns=range(num_experts), fill_value=0.0)
    most = max(float(shares.to_numpy().max()), float(mean.max()))
    rows = [("all patches", "", _cells(mean, most, "all patches, expert"))]
    for label, bits, count in zip(map(str, found.index), found["bits"], found["tokens"], strict=True):
        short = label if len(label) <= _LABEL_LETTERS else f"{label[: _LABEL_LETTERS - 1]}\u2026"
        note = f"{label}: {decimals(bits, 3)} bits of {count:,} patches"
        rows.append((short, note, _cells(shares.loc[label], most, f"{label}, expert")))
    return Chart(f"{layer}: labels", across="expert", columns=_numbers(num_experts), rows=tuple(rows))


def _cells(values: Any, most: float, note: str) -> tuple[Cell, ...]:
    return tuple(
        Cell(percent(value, 0), 0.0 if value != value else float(value) / most, f"{note} {expert}: {percent(value)}")
        for expert, value in values.items()
    )


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def modalities_in(charts: Sequence[Chart]) -> dict[str, str]:
    """The colours of the modalities that some bars have, for a legend."""
    names = {part.name for chart in charts for bar in chart.bars for part in bar.parts}
    return {name: colour for name, colour in COLOURS.items() if name in names}
