"""A few numbers that say whether a routed layer is well.

Shapes: E experts, M modalities.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe.router_losses import RouterSums, entropy


def routing_health(sums: RouterSums, modalities: Sequence[str], top_k: int) -> dict[str, Tensor]:
    """Figures of one layer, detached fp32 scalars by ``figure_modality``; NaN where a modality has no token.

    - ``experts_used``: how many experts would be as unevenly used if all used were used alike: the exponential of the
      entropy of the shares of the tokens.
    - ``confidence``: mean probability of a token's best expert.
    - ``entropy``: mean entropy of a token's probabilities.
    - ``dropped``: share of the choices that no expert served; where experts choose, of the tokens that none took.

    Args:
        sums: Of one layer.
        modalities: Names, in the order of the sums.
        top_k: Choices of a token.
    """
    found: dict[str, Tensor] = {}
    for place, name in enumerate(modalities):
        count, chosen_E = sums.tokens_M[place].detach(), sums.chosen_ME[place].detach()
        nothing = torch.full_like(count, torch.nan)
        figures = {
            "experts_used": entropy(chosen_E / chosen_E.sum().clamp_min(1.0)).exp(),
            "confidence": sums.confidence_M[place].detach() / count,
            "entropy": sums.entropy_M[place].detach() / count,
            "dropped": sums.dropped_M[place].detach() / (top_k * count),
        }
        found |= {f"{figure}_{name}": value.where(count > 0, nothing) for figure, value in figures.items()}
    return found


def mean_health(layers: Sequence[Mapping[str, Tensor]], modalities: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each figure of some modalities over the layers in which they have tokens; NaN where in none."""
    names = [name for name in layers[0] if name.rpartition("_")[2] in modalities]
    return {name: torch.stack([layer[name] for layer in layers]).nanmean() for name in names}
