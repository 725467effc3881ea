"""What routed layers report of a step, and the losses that are made of it.

A layer reports sums over its own tokens (``RouterSums``). They can be added up over replicas, and only then become
losses: the spread of a sum is not the sum of spreads. All layers' sums travel as one vector.

Shapes: T tokens, E experts, K choices, M modalities. A modality without a token counts for nothing.

Sources:
    V-MoE: Riquelme et al., arXiv 2106.05974, appendix A (importance, load).
    Switch: Fedus et al., arXiv 2101.03961, eq. 4 (balance); ST-MoE: Zoph et al., arXiv 2202.08906, eq. 5 (z).
    LIMoE: Mustafa et al., arXiv 2206.02770, section 2.2 (entropies).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from moe.dispatch.by_token import Routing
from moe.routers.expert_choice import Picks
from moe.routers.token_choice import Choice

TINY = 1e-30


@dataclass(frozen=True)
class RouterLossConfig:
    """Weights of the auxiliary losses; 0 leaves one out. Each is a mean over the routed layers.

    Attributes:
        importance: Spread of the probability mass per expert, ``(std / mean)^2``.
        load: Spread of the expected number of tokens per expert under the router's noise; needs noise.
        balance: ``E * sum_e f_e P_e``, share of choices times mean probability.
        z: Mean square of the logits' logsumexp.
        local_entropy: By modality: mean entropy of a token's probabilities. Small where tokens are sure.
        global_entropy: By modality: how far the entropy of the mean probabilities stays below ``log min_experts``.
        min_experts: By modality: at least so many experts are to be used. Where a modality is missing: all of them.
    """

    importance: float = 0.005
    load: float = 0.005
    balance: float = 0.0
    z: float = 0.0
    local_entropy: Mapping[str, float] = field(default_factory=dict)
    global_entropy: Mapping[str, float] = field(default_factory=dict)
    min_experts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens of one layer, fp32. Those marked * carry a gradient.

    Attributes:
        tokens_M: Number of tokens.
        entropy_M: * Entropy of the tokens' probabilities.
        confidence_M: Largest probability.
        dropped_M: Choices that no expert served. Where experts choose: ``top_k`` for each token that none of them took,
            which is what it had lost if it had chosen.
        z_M: * Square of the logits' logsumexp.
        probs_ME: * Probabilities.
        load_ME: * Probability of being chosen if the noise were drawn anew; 0 without noise.
        chosen_ME: Choices that were served.
    """

    tokens_M: Tensor
    entropy_M: Tensor
    confidence_M: Tensor
    dropped_M: Tensor
    z_M: Tensor
    probs_ME: Tensor
    load_ME: Tensor
    chosen_ME: Tensor

    def pack(self) -> Tensor:
        """All sums as one vector, ``[5 M + 3 M E]``."""
        return torch.cat([getattr(self, one.name).flatten() for one in fields(self)])

    @classmethod
    def unpack(cls, vector: Tensor, num_modalities: int) -> "RouterSums":
        """The inverse of ``pack``; E follows from the length."""
        names = [one.name for one in fields(cls)]
        wide = [name for name in names if name.endswith("_ME")]
        narrow = len(names) - len(wide)
        experts = (len(vector) // num_modalities - narrow) // len(wide)
        sizes = [num_modalities * (experts if name in wide else 1) for name in names]
        parts = dict(zip(names, torch.split(vector, sizes), strict=True))
        return cls(**{n: p.view(num_modalities, -1) if n in wide else p for n, p in parts.items()})


def router_sums(
    choice: Choice, routing: Routing, modality_T: Tensor, num_modalities: int, valid_T: Tensor | None = None
) -> RouterSums:
    """Adds up what a layer's router said and did.

    Args:
        choice: Of T tokens.
        routing: Where they went.
        modality_T: int64.
        num_modalities: M.
        valid_T: bool; padding does not count. None: all tokens count.
    """
    served_TK = torch.ones_like(choice.gate_TK)
    if routing.kept_TK is not None:
        served_TK = served_TK * routing.kept_TK
    experts_E = torch.arange(choice.probs_TE.shape[1], device=modality_T.device)
    served_TE = ((choice.expert_TK[..., None] == experts_E) * served_TK[..., None]).sum(1)
    member_MT = _members(choice, modality_T, num_modalities, valid_T)
    return _sums(choice, member_MT, served_TE, (1.0 - served_TK).sum(-1), expected_load(choice))


def pick_sums(
    picks: Picks, top_k: int, modality_T: Tensor, num_modalities: int, valid_T: Tensor | None = None
) -> RouterSums:
    """Adds up what a layer's experts said and took, as ``router_sums``.

    Args:
        picks: Of T tokens.
        top_k: What a token that no expert took counts among the dropped choices.
        modality_T: int64.
        num_modalities: M.
        valid_T: bool; padding does not count. None: all tokens count.
    """
    served_TE = picks.served()
    dropped_T = top_k * (served_TE.sum(-1) == 0).to(served_TE.dtype)
    member_MT = _members(picks, modality_T, num_modalities, valid_T)
    return _sums(picks, member_MT, served_TE, dropped_T, torch.zeros_like(served_TE))


def _members(said: Choice | Picks, modality_T: Tensor, num_modalities: int, valid_T: Tensor | None) -> Tensor:
    """Which tokens are of which modality, ``[M, T]`` of 0 and 1; padding is of none."""
    member_MT = modality_T == torch.arange(num_modalities, device=modality_T.device)[:, None]
    return (member_MT if valid_T is None else member_MT & valid_T).to(said.probs_TE.dtype)


def _sums(said: Choice | Picks, member_MT: Tensor, served_TE: Tensor, dropped_T: Tensor, load_TE: Tensor) -> RouterSums:
    logits_TE, probs_TE = said.logits_TE, said.probs_TE
    lse_T = logits_TE.logsumexp(-1)
    # - sum p log p, written so that an expert of probability 0 has a gradient of 0 instead of none.
    entropy_T = lse_T - (probs_TE * logits_TE.where(logits_TE.isfinite(), 0.0)).sum(-1)
    return RouterSums(
        tokens_M=member_MT.sum(1),
        entropy_M=member_MT @ entropy_T,
        confidence_M=member_MT @ probs_TE.detach().amax(-1),
        dropped_M=member_MT @ dropped_T,
        z_M=member_MT @ lse_T.square(),
        probs_ME=member_MT @ probs_TE,
        load_ME=member_MT @ load_TE,
        chosen_ME=member_MT @ served_TE,
    )


def expected_load(choice: Choice) -> Tensor:
    """``p_ie``: the probability that a token's logit reaches the K-th largest one if its noise is drawn anew.

    ``[T, E]``; zeros where the router drew no noise. Source: V-MoE, eq. 9: ``1 - Phi((threshold - logit) / sigma)``.
    """
    if choice.noise == 0:
        return torch.zeros_like(choice.probs_TE)
    threshold_T = choice.noisy_TE.gather(1, choice.expert_TK).amin(-1, keepdim=True)
    load_TE: Tensor = torch.special.ndtr((choice.logits_TE - threshold_T) / choice.noise)
    return load_TE


def squared_variation(sums_E: Tensor) -> Tensor:
    """``(std / mean)^2`` over the last dimension, with the population's deviation."""
    return sums_E.var(-1, correction=0) / (sums_E.mean(-1).square() + TINY)


def router_losses(
    sums: RouterSums,
    modalities: Sequence[str],
    config: RouterLossConfig,
    allowed: Sequence[Sequence[bool]] | None = None,
) -> dict[str, Tensor]:
    """The raw losses of one layer whose weight is not 0, fp32 scalars by name.

    Args:
        sums: Of one layer, over all replicas.
        modalities: Names, in the order of the sums.
        config: Which losses.
        allowed: Experts of each modality, ``[M][E]``, where they differ. Spreads and balance are then taken within each
            modality and averaged over its tokens; else over all tokens together.
    """
    losses: dict[str, Tensor] = {}
    total = sums.tokens_M.sum().clamp_min(1.0)
    if config.importance > 0:
        losses["importance"] = _spread(sums, sums.probs_ME, allowed)
    if config.load > 0:
        losses["load"] = _spread(sums, sums.load_ME, allowed)
    if config.balance > 0:
        losses["balance"] = _balance(sums, allowed)
    if config.z > 0:
        losses["z"] = sums.z_M.sum() / total
    experts = sums.probs_ME.shape[1]
    for place, name in enumerate(modalities):
        count, present = sums.tokens_M[place].clamp_min(1.0), sums.tokens_M[place] > 0
        if config.local_entropy.get(name, 0.0) > 0:
            losses[f"local_entropy_{name}"] = sums.entropy_M[place] / count
        if config.global_entropy.get(name, 0.0) > 0:
            available = experts if allowed is None else sum(allowed[place])
            wanted = math.log(config.min_experts.get(name, available))
            lacking = (wanted - entropy(sums.probs_ME[place] / count)).clamp_min(0.0)
            losses[f"global_entropy_{name}"] = lacking.where(present, 0.0)
    return losses


def loss_weights(config: RouterLossConfig) -> dict[str, float]:
    """The weight of every loss by the names that ``router_losses`` uses."""
    single = {name: getattr(config, name) for name in ("importance", "load", "balance", "z")}
    return {
        **single,
        **{f"local_entropy_{name}": weight for name, weight in config.local_entropy.items()},
        **{f"global_entropy_{name}": weight for name, weight in config.global_entropy.items()},
    }


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
