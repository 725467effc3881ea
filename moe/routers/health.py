"""Statistics of a layer's routing: number of experts used, confidence of the router, dropped choices.

Shapes: E experts, M modalities.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe.routers.losses import entropy
from moe.routers.sums import RouterSums


def routing_health(sums: RouterSums, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Figures by ``figure_modality``, detached fp32: scalars, or ``[L]`` of L layers; NaN for one without tokens.

    - ``experts_used``: the exponential of the entropy of the experts' shares of the choices, served or not. If n
      experts are chosen equally often and the others never, it is n.
    - ``confidence``: mean probability of a token's best expert.
    - ``entropy``: mean entropy of a token's probabilities.
    - ``dropped``: share of the choices that no expert served; with expert choice, share of the tokens that no expert
      took.

    Args:
        sums: Of one layer or several.
        modalities: Names, in the order of the sums.
    """
    figures = _figures(_counts(sums), sums.chosen_ME.detach())
    present_M = sums.tokens_M.detach() > 0
    by_modality = {figure: value.where(present_M, torch.nan).unbind(-1) for figure, value in figures.items()}
    return {
        f"{figure}_{name}": values[place]
        for place, name in enumerate(modalities)
        for figure, values in by_modality.items()
    }


def layer_health(sums: RouterSums) -> dict[str, Tensor]:
    """The same figures over the tokens of all modalities, and ``largest_load``, detached fp32: scalars, or ``[L]``.

    ``largest_load`` is the busiest expert's share of the choices, served or not, times the number of experts: 1 where
    all are equally busy.
    """
    chosen_E = sums.chosen_ME.detach().sum(-2)
    load = chosen_E.amax(-1) * chosen_E.shape[-1] / chosen_E.sum(-1).clamp_min(1.0)
    return {**_figures(_counts(sums).sum(-1), chosen_E), "largest_load": load}


def _counts(sums: RouterSums) -> Tensor:
    """Tokens, confidence, entropy, choices and dropped choices, detached, ``[5, ..., M]``."""
    return torch.stack([sums.tokens_M, sums.confidence_M, sums.entropy_M, sums.choices_M, sums.dropped_M]).detach()


def _figures(counts: Tensor, chosen_E: Tensor) -> dict[str, Tensor]:
    """The figures of ``_counts`` and of choices ``[..., E]``; NaN where there are no tokens."""
    tokens, confidence, entropies, choices, dropped = counts.unbind()
    return {
        "experts_used": entropy(chosen_E / chosen_E.sum(-1, keepdim=True).clamp_min(1.0)).exp(),
        "confidence": confidence / tokens,
        "entropy": entropies / tokens,
        "dropped": dropped / choices,
    }


def mean_health(layers: Sequence[Mapping[str, Tensor]], modalities: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each figure of some modalities over the layers in which they have tokens; NaN if in none.

    Args:
        layers: Figures of a layer each, or of several.
        modalities: Names.
    """
    names = [name for name in layers[0] if name.rpartition("_")[2] in modalities]
    if not names:
        return {}
    rows = [torch.stack([one[name].reshape(-1) for name in names]) for one in layers]
    means = (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).nanmean(1)
    return dict(zip(names, means.unbind(), strict=True))
