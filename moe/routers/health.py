"""Statistics of a layer's routing: number of experts used, confidence of the router, dropped choices.

Shapes: E experts, M modalities.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe.routers.losses import entropy
from moe.routers.sums import RouterSums


def routing_health(sums: RouterSums, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Figures of one layer, detached fp32 scalars by ``figure_modality``; NaN where a modality has no token.

    - ``experts_used``: the exponential of the entropy of the experts' shares of the choices, served or not. If n
      experts are chosen equally often and the others never, it is n.
    - ``confidence``: mean probability of a token's best expert.
    - ``entropy``: mean entropy of a token's probabilities.
    - ``dropped``: share of the choices that no expert served; with expert choice, share of the tokens that no expert
      took.

    Args:
        sums: Of one layer.
        modalities: Names, in the order of the sums.
    """
    found: dict[str, Tensor] = {}
    for place, name in enumerate(modalities):
        present = sums.tokens_M[place] > 0
        figures = _figures(sums, slice(place, place + 1))
        found |= {f"{figure}_{name}": value.where(present, torch.nan) for figure, value in figures.items()}
    return found


def layer_health(sums: RouterSums) -> dict[str, Tensor]:
    """The same figures of one layer over the tokens of all modalities, and ``largest_load``, detached fp32 scalars.

    ``largest_load`` is the busiest expert's share of the choices, served or not, times the number of experts: 1 where
    all are equally busy.
    """
    chosen_E = sums.chosen_ME.detach().sum(0)
    load = chosen_E.max() * len(chosen_E) / chosen_E.sum().clamp_min(1.0)
    return {**_figures(sums, slice(None)), "largest_load": load}


def _figures(sums: RouterSums, places: slice) -> dict[str, Tensor]:
    """The figure for the tokens of some modalities together; NaN if there are none."""
    count, chosen_E = sums.tokens_M[places].detach().sum(), sums.chosen_ME[places].detach().sum(0)
    return {
        "experts_used": entropy(chosen_E / chosen_E.sum().clamp_min(1.0)).exp(),
        "confidence": sums.confidence_M[places].detach().sum() / count,
        "entropy": sums.entropy_M[places].detach().sum() / count,
        "dropped": sums.dropped_M[places].detach().sum() / sums.choices_M[places].detach().sum(),
    }


def mean_health(layers: Sequence[Mapping[str, Tensor]], modalities: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each figure of some modalities over the layers in which they have tokens; NaN if in none."""
    names = [name for name in layers[0] if name.rpartition("_")[2] in modalities]
    return {name: torch.stack([layer[name] for layer in layers]).nanmean() for name in names}
