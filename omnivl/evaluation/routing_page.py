"""The routing of a model as one HTML page that needs nothing else: figures, tables, and what each expert took."""

import base64
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from moe.analysis import co_activation, expert_shares, mutual_information, strongest, usage
from omnivl.evaluation.pictures import PictureSet
from omnivl.evaluation.routing import CLASS_TOKEN

COLOURS = {"image": "#2563eb", "video": "#7c3aed", "text": "#d97706"}
EXPLAINING = ("modality", "label", "position", "frame", "word")
_PATCHES, _WORDS, _CROP = 12, 16, 44
_SPOT = ("sample", "frame", "row", "column")


@dataclass(frozen=True)
class Taken:
    """What one expert takes with the highest weight.

    Attributes:
        expert: Its number.
        load: Its share of the layer's choices.
        patches: Crops as data URIs.
        words: Words.
    """

    expert: int
    load: float
    patches: tuple[str, ...]
    words: tuple[str, ...]


def routing_page(tokens: Any, num_experts: int, pictures: PictureSet, patch_size: int, title: str) -> str:
    """The page as HTML.

    Args:
        tokens: From ``routed_tokens``.
        num_experts: Experts of a routed layer.
        pictures: What was looked at, for the galleries.
        patch_size: Side of a patch in pixels.
        title: Heads the page.
    """
    layers = list(tokens["layer"].cat.categories)
    used = usage(tokens, num_experts)
    figures = [_used(used), *(_loads(tokens, layer, num_experts) for layer in layers)]
    figures += [_flow(tokens, *pair, num_experts) for pair in itertools.pairwise(layers)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("routing_page.html.j2").render(
        title=title,
        plotly=get_plotlyjs(),
        figures=[_html(figure) for figure in figures],
        usage=used.to_dict("records"),
        explained=_explained(tokens),
        galleries={layer: list(_taken(tokens, layer, pictures, patch_size)) for layer in layers},
        samples=len(pictures),
        rows=len(tokens),
        num_experts=num_experts,
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
    figure.update_xaxes(title="expert", dtick=1)
    figure.update_yaxes(title="share of the choices", tickformat=".0%")
    return _styled(figure, f"{layer}: load by expert")


def _flow(tokens: Any, first: str, second: str, num_experts: int) -> Any:
    every = range(num_experts)
    found = co_activation(tokens, first, second).reindex(index=every, columns=every, fill_value=0.0)
    heat = go.Heatmap(z=found.to_numpy(), x=found.columns, y=found.index, colorscale="Blues", zmin=0, zmax=1)
    figure = go.Figure(heat)
    figure.update_xaxes(title=f"expert in {second}", dtick=1)
    figure.update_yaxes(title=f"expert in {first}", dtick=1)
    return _styled(figure, f"From {first} to {second}")


def _explained(tokens: Any) -> list[dict[str, Any]]:
    """How much each column explains, beside the same with its values shuffled among the tokens."""
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
    """The pixels of a patch, enlarged, as a PNG data URI; of a tubelet its first frame."""
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
