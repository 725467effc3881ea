"""The routing of a model as one self-contained HTML page: figures, tables, and the tokens of each expert."""

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from moe.analysis import co_activation, expert_shares, expert_table, mutual_information, profiles, strongest, usage
from omnivl.inference.pictures import PictureSet
from omnivl.tasks.routing.tokens import CLASS_TOKEN

COLOURS = {"image": "#2563eb", "video": "#7c3aed", "text": "#d97706"}
EXPLAINING = ("modality", "label", "position", "frame", "word")
_PATCHES, _WORDS, _CROP = 12, 16, 44
_SPOT = ("sample", "frame", "row", "column")
_LABELS, _LABEL_SAMPLES, _LABEL_LETTERS = 15, 3, 22
_LONG = 8
"""Number of experts above which a table is collapsed."""


@dataclass(frozen=True)
class Taken:
    """The tokens that one expert takes with the highest weight.

    Attributes:
        expert: Index of the expert.
        load: The expert's share of the layer's choices.
        patches: Crops as data URIs.
        words: Words.
    """

    expert: int
    load: float
    patches: tuple[str, ...]
    words: tuple[str, ...]


def routing_page(tokens: Any, num_experts: Mapping[str, int], pictures: PictureSet, patch_size: int, title: str) -> str:
    """The page as HTML.

    Args:
        tokens: From ``routed_tokens``.
        num_experts: Experts of each routed layer.
        pictures: The pictures or clips of the tokens, for the galleries.
        patch_size: Side of a patch in pixels.
        title: Heading of the page.
    """
    layers = list(tokens["layer"].cat.categories)
    used = usage(tokens, num_experts)
    experts = expert_table(tokens)
    most = max(num_experts.values())
    figures = [_used(used), _by_expert(experts, "confidence", "Confidence by expert", most)]
    if experts["dropped"].any():
        figures.append(_by_expert(experts, "dropped", "Share of its choices that an expert drops", most))
    figures += [_loads(tokens, layer, num_experts[layer]) for layer in layers]
    flows = (_flow(tokens, *pair, num_experts) for pair in itertools.pairwise(layers))
    figures += [figure for figure in flows if figure is not None]
    labels = [figure for layer in layers if (figure := _labels(tokens, layer, num_experts[layer])) is not None]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        plotly=get_plotlyjs(),
        figures=[_html(figure) for figure in figures],
        labels=[_html(figure) for figure in labels],
        label_samples=_LABEL_SAMPLES,
        usage=used.to_dict("records"),
        experts={layer: _rows(experts, layer, num_experts[layer]) for layer in layers},
        modalities=[name for name in COLOURS if name in experts],
        folded=most > _LONG,
        explained=_explained(tokens),
        galleries={layer: list(_taken(tokens, layer, pictures, patch_size)) for layer in layers},
        samples=len(pictures),
        rows=len(tokens),
        num_experts=" or ".join(dict.fromkeys(map(str, num_experts.values()))),
    )


def _html(figure: Any) -> str:
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
    )
    return html


def _styled(figure: Any, title: str, height: int = 320) -> Any:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 50, "r": 12, "t": 44, "b": 44},
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


def _used(found: Any) -> Any:
    figure = go.Figure()
    for name, part in found.groupby("modality", observed=True):
        figure.add_bar(x=part["layer"].astype(str), y=part["experts_used"], name=name, marker_color=COLOURS[name])
    figure.update_yaxes(title="experts used", rangemode="tozero")
    return _styled(figure, "Experts used by modality")


def _loads(tokens: Any, layer: str, num_experts: int) -> Any:
    shares = expert_shares(tokens[tokens["layer"] == layer]).set_index("expert")
    figure = go.Figure()
    for name in (name for name in COLOURS if name in shares):
        loads = (shares["load"] * shares[name]).reindex(range(num_experts), fill_value=0.0)
        figure.add_bar(x=loads.index, y=loads, name=name, marker_color=COLOURS[name])
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="expert", dtick=_step(num_experts))
    figure.update_yaxes(title="share of the choices", tickformat=".0%")
    return _styled(figure, f"{layer}: load by expert")


def _flow(tokens: Any, first: str, second: str, num_experts: Mapping[str, int]) -> Any:
    """Where the tokens of each expert go next; None if no token passes both layers, as in two towers."""
    found = co_activation(tokens, first, second)
    if found.empty:
        return None
    found = found.reindex(index=range(num_experts[first]), columns=range(num_experts[second]), fill_value=0.0)
    heat = go.Heatmap(z=found.to_numpy(), x=found.columns, y=found.index, colorscale="Blues", zmin=0, zmax=1)
    figure = go.Figure(heat)
    figure.update_xaxes(title=f"expert in {second}", dtick=_step(num_experts[second]))
    figure.update_yaxes(title=f"expert in {first}", dtick=_step(num_experts[first]))
    return _styled(figure, f"From {first} to {second}")


def _by_expert(experts: Any, column: str, title: str, num_experts: int) -> Any:
    """A heatmap of a column by layer and expert; empty if there is none."""
    found = experts.pivot(index="layer", columns="expert", values=column).reindex(columns=range(num_experts))
    names = list(map(str, found.index))
    most = max(float(np.nanmax(found.to_numpy())), 1e-9)
    heat = go.Heatmap(z=found.to_numpy(), x=found.columns, y=names, colorscale="Blues", zmin=0, zmax=most)
    figure = go.Figure(heat)
    figure.update_xaxes(title="expert", dtick=_step(num_experts), showgrid=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    return _styled(figure, title)


def _labels(tokens: Any, layer: str, num_experts: int) -> Any:
    """Experts of the labels that deviate most, below those of all patches; None if no label has enough patches."""
    own = tokens[(tokens["layer"] == layer) & (tokens["row"] >= 0) & (tokens["choice"] == 0) & tokens["label"].notna()]
    samples = own.groupby("label", observed=True)["sample"].nunique()
    often = own[own["label"].isin(samples.index[samples >= _LABEL_SAMPLES])]
    found = profiles(often, layer, count=_LABELS)
    if found.empty:
        return None
    every = range(num_experts)
    mean = own["expert"].value_counts(normalize=True).reindex(every, fill_value=0.0).to_numpy()
    shares = np.vstack([mean, found.reindex(columns=every, fill_value=0.0).to_numpy()])
    names = ["all patches", *map(str, found.index)]
    deviates = [
        "",
        *(
            f"{bits:.3f} bits of {tokens:,} patches"
            for bits, tokens in zip(found["bits"], found["tokens"], strict=True)
        ),
    ]
    heat = go.Heatmap(
        z=shares,
        x=list(every),
        y=list(range(len(names))),
        customdata=[[[name, note]] * num_experts for name, note in zip(names, deviates, strict=True)],
        hovertemplate="%{customdata[0]}: %{z:.1%} to expert %{x}<br>%{customdata[1]}<extra></extra>",
        colorscale="Blues",
        zmin=0,
        zmax=float(shares.max()),
        colorbar={"tickformat": ".0%", "thickness": 12},
    )
    figure = go.Figure(heat)
    short = [name if len(name) <= _LABEL_LETTERS else f"{name[: _LABEL_LETTERS - 1]}\u2026" for name in names]
    figure.update_xaxes(title="expert", dtick=_step(num_experts))
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=short, autorange="reversed", automargin=True)
    return _styled(figure, f"{layer}: labels", height=130 + 20 * len(names))


def _step(num_experts: int) -> int:
    """Experts from one tick to the next: a power of two that leaves twelve ticks or fewer."""
    return 1 << max(0, -(-num_experts // 12) - 1).bit_length()


def _rows(experts: Any, layer: str, num_experts: int) -> list[dict[str, Any]]:
    """The table of one layer, with rows for experts without a token."""
    own = experts[experts["layer"] == layer].set_index("expert").reindex(range(num_experts))
    own["choices"] = own["choices"].fillna(0).astype(int)
    rows: list[dict[str, Any]] = own.reset_index().to_dict("records")
    return rows


def _explained(tokens: Any) -> list[dict[str, Any]]:
    """How much each column explains, and the same with its values shuffled among the tokens."""
    rows = []
    random = np.random.default_rng(0)
    for column in EXPLAINING:
        known = tokens[tokens[column].notna() & (tokens[column] != CLASS_TOKEN)].copy()
        if known[column].nunique() < 2:
            continue
        found = mutual_information(known, column).set_index("layer")
        known[column] = random.permutation(known[column].to_numpy())
        shuffled = mutual_information(known, column).set_index("layer")
        for layer in found.index:
            rows.append({"layer": layer, "column": column, **found.loc[layer], "shuffled": shuffled.loc[layer, "bits"]})
    return sorted(rows, key=lambda row: (str(row["layer"]), -float(row["bits"])))


def _taken(tokens: Any, layer: str, pictures: PictureSet, patch_size: int) -> Iterator[Taken]:
    own = tokens[tokens["layer"] == layer]
    patches, words = own[own["row"] >= 0], own[own["word"].notna()]
    for expert, count in own["expert"].value_counts().items():
        spots = strongest(patches, layer, expert, _SPOT, _PATCHES)[list(_SPOT)].to_numpy().tolist()
        crops = tuple(_crop(pictures, spot, patch_size) for spot in spots)
        spoken = strongest(words, layer, expert, ["word"], _WORDS)["word"]
        yield Taken(int(expert), float(count / len(own)), crops, tuple(map(str, spoken)))


def _crop(pictures: PictureSet, spot: Sequence[int], patch_size: int) -> str:
    """The enlarged pixels of a patch as a PNG data URI; for a tubelet, of its first frame."""
    sample, frame, row, column = spot
    picture = pictures.frames([sample])[0][frame].permute(1, 2, 0).numpy()
    cut = picture[row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
    large = cv2.resize(cut, (_CROP, _CROP), interpolation=cv2.INTER_NEAREST)
    done, encoded = cv2.imencode(".png", cv2.cvtColor(large, cv2.COLOR_RGB2BGR))
    assert done, "OpenCV writes PNG"
    return f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def write_table(tokens: Any, path: Path) -> None:
    """The table as a Parquet file."""
    pd.DataFrame(tokens).to_parquet(path, index=False)
