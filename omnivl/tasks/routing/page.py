"""The routing of a model as one self-contained HTML page without scripts: charts, tables, tokens by expert."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe.analysis import expert_table, mutual_information, usage
from omnivl.inference.pictures import PictureSet
from omnivl.pages import page_template
from omnivl.tasks.routing.charts import (
    COLOURS,
    LABEL_SAMPLES,
    by_expert_chart,
    decimals,
    flow_charts,
    label_chart,
    load_chart,
    modalities_in,
    percent,
    used_chart,
)
from omnivl.tasks.routing.forced import Forced, idle, modalities_of, told
from omnivl.tasks.routing.maps import Shots, expert_colour, mapped_samples, taken_by_experts
from omnivl.tasks.routing.tokens import CLASS_TOKEN

EXPLAINING = ("modality", "label", "position", "frame", "word")
_LONG = 8
"""Number of experts above which a table is collapsed."""

_UNKNOWN = Forced()


def routing_page(
    tokens: Any,
    num_experts: Mapping[str, int],
    pictures: PictureSet | Sequence[PictureSet],
    patch_size: int,
    title: str,
    forced: Forced = _UNKNOWN,
) -> str:
    """The page as HTML.

    Args:
        tokens: From ``routed_tokens``, or ``joined`` from several of them.
        num_experts: Experts of each routed layer.
        pictures: The pictures, the clips or both, of which the tokens are.
        patch_size: Side of a patch in pixels.
        title: Heading of the page.
        forced: What the architecture leaves no choice in, from ``forced_by``.
    """
    sets = [pictures] if isinstance(pictures, PictureSet) else list(pictures)
    shots = Shots(sets)
    layers = list(tokens["layer"].cat.categories)
    used, experts = usage(tokens, num_experts), expert_table(tokens)
    most = max(num_experts.values())
    charts = [
        used_chart(used, num_experts, forced),
        by_expert_chart(experts, "confidence", "Confidence by expert", most),
    ]
    if experts["dropped"].any():
        charts.append(by_expert_chart(experts, "dropped", "Share of its choices that an expert drops", most))
    charts += [load_chart(tokens, layer, num_experts[layer]) for layer in layers]
    charts += flow_charts(tokens, num_experts)
    labels = [label_chart(tokens, layer, num_experts[layer]) for layer in layers]
    return page_template(Path(__file__).parent, "page.html.j2").render(
        title=title,
        percent=percent,
        decimals=decimals,
        charts=charts,
        colours=modalities_in(charts),
        idle=idle(tokens, num_experts, forced),
        told=told(tokens, num_experts, forced),
        maps={one.media: list(mapped_samples(tokens, one, shots, patch_size)) for one in sets},
        expert_colours=["#{:02x}{:02x}{:02x}".format(*expert_colour(expert)) for expert in range(most)],
        labels=[chart for chart in labels if chart is not None],
        label_samples=LABEL_SAMPLES,
        usage=used.to_dict("records"),
        experts={layer: _rows(experts, layer, num_experts[layer]) for layer in layers},
        forced=_forced_cells(tokens, num_experts, forced),
        modalities=[name for name in COLOURS if name in experts],
        folded=most > _LONG,
        explained=_explained(tokens, forced),
        galleries={layer: list(taken_by_experts(tokens, layer, shots, patch_size)) for layer in layers},
        samples=" and ".join(f"{len(one):,} {'pictures' if one.media == 'image' else 'clips'}" for one in sets),
        rows=len(tokens),
        num_experts=" or ".join(dict.fromkeys(map(str, num_experts.values()))),
    )


def _rows(experts: Any, layer: str, num_experts: int) -> list[dict[str, Any]]:
    """The table of one layer, with rows for experts without a token."""
    own = experts[experts["layer"] == layer].set_index("expert").reindex(range(num_experts))
    own["choices"] = own["choices"].fillna(0).astype(int)
    rows: list[dict[str, Any]] = own.reset_index().to_dict("records")
    return rows


def _forced_cells(tokens: Any, num_experts: Mapping[str, int], forced: Forced) -> dict[str, list[dict[str, bool]]]:
    """By layer, expert and modality, whether the share of the expert's choices could not be another one."""
    cells = {}
    for layer, count in num_experts.items():
        passing = modalities_of(tokens, layer)
        open_to = [[name for name in passing if forced.may(layer, name, expert)] for expert in range(count)]
        cells[layer] = [{name: name not in own or len(own) == 1 for name in COLOURS} for own in open_to]
    return cells


def _explained(tokens: Any, forced: Forced) -> list[dict[str, Any]]:
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
            note = ""
            if column == "modality":
                alone = len(modalities_of(tokens, layer)) == 1
                note = "one modality only" if alone else "partly forced" if layer in forced.allowed else ""
            row = {"layer": layer, "column": column, **found.loc[layer], "shuffled": shuffled.loc[layer, "bits"]}
            rows.append({**row, "note": note})
    return sorted(rows, key=lambda row: (str(row["layer"]), -float(row["bits"])))


def write_table(tokens: Any, path: Path) -> None:
    """The table as a Parquet file."""
    pd.DataFrame(tokens).to_parquet(path, index=False)
