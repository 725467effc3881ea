"""The auxiliary losses of routers, computed from the sums of a layer over all replicas.

Shapes: E experts, M modalities. A modality without a token counts for nothing.

Sources:
    V-MoE: Riquelme et al., arXiv 2106.05974, appendix A (importance, load).
    Switch: Fedus et al., arXiv 2101.03961, eq. 4 (balance); ST-MoE: Zoph et al., arXiv 2202.08906, eq. 5 (z).
    LIMoE: Mustafa et al., arXiv 2206.02770, section 2.2 (entropies).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from moe.ranges import Range
from moe.routers.sums import RouterSums

TINY = 1e-30

Weight = Annotated[float, Range(0)]
"""The weight of a loss."""


@dataclass(frozen=True)
class RouterLossConfig:
    """Weights of the auxiliary losses; 0 leaves one out. Each is a mean over the routed layers.

    Attributes:
        importance: Spread of the probability mass per expert, ``(std / mean)^2``.
        balance: ``E * sum_e f_e P_e``, share of choices, served or not, times mean probability.
        z: Mean square of the logits' logsumexp.
        local_entropy: By modality: mean entropy of a token's probabilities. It is small if the router is confident.
        global_entropy: By modality: how far the entropy of the mean probabilities stays below ``log min_experts``.
        min_experts: By modality: the least number of experts to use. All of them for a modality that is not named.
    """

    spreads: ClassVar[Mapping[str, str]] = {"importance": "probs_ME"}
    """The losses that are spreads, in the order in which they are added up, with the sums of each."""

    importance: Weight = 0.005
    balance: Weight = 0.0
    z: Weight = 0.0
    local_entropy: Mapping[str, Weight] = field(default_factory=dict)
    global_entropy: Mapping[str, Weight] = field(default_factory=dict)
    min_experts: Mapping[str, Annotated[float, Range(1)]] = field(default_factory=dict)

    def weights(self) -> dict[str, float]:
        """The weight of every loss by the names that ``of`` uses."""
        return {
            **{name: getattr(self, name) for name in (*self.spreads, "balance", "z")},
            **{f"local_entropy_{name}": weight for name, weight in self.local_entropy.items()},
            **{f"global_entropy_{name}": weight for name, weight in self.global_entropy.items()},
        }

    def of(
        self, sums: RouterSums, modalities: Sequence[str], allowed: Sequence[Sequence[bool]] | None = None
    ) -> dict[str, Tensor]:
        """The losses of one layer whose weight is not 0, unweighted, fp32 scalars by name.

        Args:
            sums: Of one layer, over all replicas.
            modalities: Names, in the order of the sums.
            allowed: Experts of each modality, ``[M][E]``, if they differ. Spreads and balance are then computed within
                each modality and averaged over its tokens; else over all tokens together.
        """
        losses = {
            name: _spread(sums, getattr(sums, of), allowed)
            for name, of in self.spreads.items()
            if getattr(self, name) > 0
        }
        if self.balance > 0:
            losses["balance"] = _balance(sums, allowed)
        if self.z > 0:
            losses["z"] = sums.z_M.sum() / sums.tokens_M.sum().clamp_min(1.0)
        return losses | dict(self._entropies(sums, modalities, allowed))

    def _entropies(
        self, sums: RouterSums, modalities: Sequence[str], allowed: Sequence[Sequence[bool]] | None
    ) -> Iterator[tuple[str, Tensor]]:
        """The losses of each modality, by name."""
        experts = sums.probs_ME.shape[1]
        for place, name in enumerate(modalities):
            count, present = sums.tokens_M[place].clamp_min(1.0), sums.tokens_M[place] > 0
            if self.local_entropy.get(name, 0.0) > 0:
                yield f"local_entropy_{name}", sums.entropy_M[place] / count
            if self.global_entropy.get(name, 0.0) > 0:
                available = experts if allowed is None else sum(allowed[place])
                wanted = math.log(self.min_experts.get(name, available))
                lacking = (wanted - entropy(sums.probs_ME[place] / count)).clamp_min(0.0)
                yield f"global_entropy_{name}", lacking.where(present, 0.0)


def squared_variation(sums_E: Tensor) -> Tensor:
    """``(std / mean)^2`` over the last dimension, with the population's deviation."""
    return sums_E.var(-1, correction=0) / (sums_E.mean(-1).square() + TINY)


def entropy(probs_E: Tensor) -> Tensor:
    """``- sum p log p`` over the last dimension; finite gradients also where p is 0."""
    return -(probs_E * (probs_E + TINY).log()).sum(-1)


def _groups(sums: RouterSums, allowed: Sequence[Sequence[bool]] | None) -> list[tuple[Tensor, list[int], Tensor]]:
    """(modalities, experts, share of the tokens) of each set of tokens that may go to the same experts."""
    modalities, experts = sums.probs_ME.shape
    device, total = sums.tokens_M.device, sums.tokens_M.sum().clamp_min(1.0)
    if allowed is None:
        return [(torch.arange(modalities, device=device), list(range(experts)), torch.ones((), device=device))]
    return [
        (torch.tensor([place], device=device), [e for e, may in enumerate(row) if may], sums.tokens_M[place] / total)
        for place, row in enumerate(allowed)
    ]


def _spread(sums: RouterSums, values_ME: Tensor, allowed: Sequence[Sequence[bool]] | None) -> Tensor:
    parts = [
        share * squared_variation(values_ME[places].sum(0)[experts])
        for places, experts, share in _groups(sums, allowed)
    ]
    return torch.stack(parts).sum()


def _balance(sums: RouterSums, allowed: Sequence[Sequence[bool]] | None) -> Tensor:
    parts = []
    for places, experts, share in _groups(sums, allowed):
        chosen_E, probs_E = sums.chosen_ME[places].sum(0)[experts], sums.probs_ME[places].sum(0)[experts]
        fraction_E = chosen_E / chosen_E.sum().clamp_min(1.0)
        mean_E = probs_E / sums.tokens_M[places].sum().clamp_min(1.0)
        parts.append(share * len(experts) * (fraction_E * mean_E).sum())
    return torch.stack(parts).sum()
