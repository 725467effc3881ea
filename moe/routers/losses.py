"""The auxiliary losses of routers, computed from the sums of a layer over all replicas.

Shapes: E experts, M modalities. A modality without a token counts for nothing.

Sources:
    V-MoE: Riquelme et al., arXiv 2106.05974, appendix A (importance, load).
    Switch: Fedus et al., arXiv 2101.03961, eq. 4 (balance); ST-MoE: Zoph et al., arXiv 2202.08906, eq. 5 (z).
    LIMoE: Mustafa et al., arXiv 2206.02770, section 2.2 (entropies).
"""

import math
from collections.abc import Mapping, Sequence
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
        """The losses whose weight is not 0, unweighted, fp32 by name: scalars, or ``[L]`` of L layers.

        Args:
            sums: Of one layer or several, over all replicas.
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
            losses["z"] = sums.z_M.sum(-1) / sums.tokens_M.sum(-1).clamp_min(1.0)
        return losses | self._entropies(sums, modalities, allowed)

    def _entropies(
        self, sums: RouterSums, modalities: Sequence[str], allowed: Sequence[Sequence[bool]] | None
    ) -> dict[str, Tensor]:
        """The losses of each modality, by name."""
        experts, count_M = sums.probs_ME.shape[-1], sums.tokens_M.clamp_min(1.0)
        found = {
            f"local_entropy_{name}": of_one
            for name, of_one in zip(modalities, (sums.entropy_M / count_M).unbind(-1), strict=True)
            if self.local_entropy.get(name, 0.0) > 0
        }
        if not any(self.global_entropy.values()):
            return found
        reached_M = entropy(sums.probs_ME / count_M[..., None])
        for place, name in enumerate(modalities):
            if self.global_entropy.get(name, 0.0) > 0:
                available = experts if allowed is None else sum(allowed[place])
                wanted = math.log(self.min_experts.get(name, available))
                lacking = (wanted - reached_M[..., place]).clamp_min(0.0)
                found[f"global_entropy_{name}"] = lacking.where(sums.tokens_M[..., place] > 0, 0.0)
        return found


def squared_variation(sums_E: Tensor) -> Tensor:
    """``(std / mean)^2`` over the last dimension, with the population's deviation."""
    return sums_E.var(-1, correction=0) / (sums_E.mean(-1).square() + TINY)


def entropy(probs_E: Tensor) -> Tensor:
    """``- sum p log p`` over the last dimension; finite gradients also where p is 0."""
    return -(probs_E * (probs_E + TINY).log()).sum(-1)


@dataclass(frozen=True)
class _Group:
    """Tokens that may go to the same experts.

    Attributes:
        place: Their modality; None: all together.
        experts: Runs of the experts to which they may go.
        share: Their share of the tokens ``[...]``; None: all.
    """

    place: int | None
    experts: Sequence[slice]
    share: Tensor | None

    @property
    def size(self) -> int:
        """How many experts."""
        return sum(run.stop - run.start for run in self.experts)

    def of(self, values_ME: Tensor) -> Tensor:
        """Sums of the tokens by expert, ``[..., size]``."""
        own_E = values_ME.sum(-2) if self.place is None else values_ME[..., self.place, :]
        parts = [own_E[..., run] for run in self.experts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tokens(self, tokens_M: Tensor) -> Tensor:
        """How many tokens, at least 1, ``[...]``."""
        return (tokens_M.sum(-1) if self.place is None else tokens_M[..., self.place]).clamp_min(1.0)

    def weighed(self, value: Tensor) -> Tensor:
        """A loss by the share of the tokens."""
        return value if self.share is None else self.share * value


def _groups(sums: RouterSums, allowed: Sequence[Sequence[bool]] | None) -> list[_Group]:
    if allowed is None:
        return [_Group(None, [slice(0, sums.probs_ME.shape[-1])], None)]
    total = sums.tokens_M.sum(-1).clamp_min(1.0)
    return [_Group(place, _runs(row), sums.tokens_M[..., place] / total) for place, row in enumerate(allowed)]


def _runs(chosen: Sequence[bool]) -> list[slice]:
    """The places where a row is true, as runs: indexing by them copies nothing to a device."""
    edges = [place for place in range(len(chosen) + 1) if (*chosen, False)[place] != (False, *chosen)[place]]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _spread(sums: RouterSums, values_ME: Tensor, allowed: Sequence[Sequence[bool]] | None) -> Tensor:
    return _added([group.weighed(squared_variation(group.of(values_ME))) for group in _groups(sums, allowed)])


def _balance(sums: RouterSums, allowed: Sequence[Sequence[bool]] | None) -> Tensor:
    parts = []
    for group in _groups(sums, allowed):
        chosen_E = group.of(sums.chosen_ME)
        fraction_E = chosen_E / chosen_E.sum(-1, keepdim=True).clamp_min(1.0)
        mean_E = group.of(sums.probs_ME) / group.tokens(sums.tokens_M)[..., None]
        parts.append(group.weighed(group.size * (fraction_E * mean_E).sum(-1)))
    return _added(parts)


def _added(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)
