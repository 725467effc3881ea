"""Fewer experts for a trained layer: the least used are taken out, or similar ones are merged.

A reduction is a partition: ``groups``, lists of experts, each of which becomes one expert. Experts in no group are
taken out. Experts are grouped within a pool only, that is, among those that the same modalities may use.

Shapes: E experts, G groups, D hidden size, F inner size.

A layer computes the same as before if the experts taken out had served no token, or those merged were equal with equal
rows of the router, and the weights of a token's experts are independent of the number of experts: with
``renormalise``, and in merging with ``top_k: 1``. Otherwise the remaining probabilities grow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.routers.base import require

Groups = Sequence[Sequence[int]]
SparseFilling = LIMoEConfig | MoMELIMoEConfig


def pools_of(config: SparseFilling) -> list[list[int]]:
    """The experts of each pool, the common ones last; one pool where all modalities share all."""
    if isinstance(config, LIMoEConfig):
        return [list(range(config.num_experts))]
    pools, first = [], 0
    for size in (*config.pools.values(), config.common_experts):
        pools.append(list(range(first, first + size)))
        first += size
    return [pool for pool in pools if pool]


def reduced_config(config: SparseFilling, keep: int) -> SparseFilling:
    """The filling with at most ``keep`` experts in each pool.

    Raises:
        ValueError: The router sends a token to more experts than there would be.
    """
    fewest = config.router.fewest_experts
    require(keep >= 1, f"keep: got {keep} experts, allowed is 1 or more")
    if isinstance(config, LIMoEConfig):
        allowed = f"allowed is {fewest} or more, as many as a token gets"
        require(keep >= fewest, f"keep: got {keep} experts, {allowed}")
        return replace(config, num_experts=min(keep, config.num_experts))
    pools = {name: min(keep, size) for name, size in config.pools.items()}
    return replace(config, pools=pools, common_experts=min(keep, config.common_experts))


def prune(counts_E: Tensor, pools: Sequence[Sequence[int]], keep: int) -> list[list[int]]:
    """Keeps the most used experts of each pool, in their order; of equally used ones the first.

    Args:
        counts_E: Tokens that each expert has served.
        pools: See ``pools_of``.
        keep: Most experts of a pool.
    """
    return [[expert] for pool in pools for expert in _most_used(counts_E, pool, keep)]


def merge(counts_E: Tensor, similarity_EE: Tensor, pools: Sequence[Sequence[int]], keep: int) -> list[list[int]]:
    """Groups the experts of each pool around its most used ones: each other joins the one that it is most similar to.

    Args:
        counts_E: Tokens that each expert has served.
        similarity_EE: Of experts, from ``router_similarity`` or of their outputs.
        pools: See ``pools_of``.
        keep: Most groups of a pool.

    Source: Li et al., Merge, then Compress (M-SMoE), arXiv 2310.01334, section 3.1.
    Differs: experts are not permuted to match each other, and the router loses the rows of merged experts.
    """
    groups = []
    for pool in pools:
        centres = _most_used(counts_E, pool, keep)
        own = {centre: [centre] for centre in centres}
        for expert in pool:
            if expert not in own:
                own[centres[int(similarity_EE[expert, centres].argmax())]].append(expert)
        groups += [sorted(group) for group in own.values()]
    return groups


def router_similarity(gate_ED: Tensor) -> Tensor:
    """Cosines of the router's rows, fp32 ``[E, E]``."""
    rows = torch.nn.functional.normalize(gate_ED.float(), dim=-1)
    return rows @ rows.t()


def output_similarity(outputs_ETD: Tensor) -> Tensor:
    """Mean cosines of the experts' outputs for the same T tokens, fp32 ``[E, E]``."""
    rows = torch.nn.functional.normalize(outputs_ETD.float(), dim=-1)
    return torch.einsum("etd,ftd->ef", rows, rows) / rows.shape[1]


def reduced(weights: Mapping[str, Tensor], groups: Groups, counts_E: Tensor) -> dict[str, Tensor]:
    """The weights of a layer with a group in place of each expert.

    Args:
        weights: By name within the layer, as ``SparseFeedForward`` has them: whatever belongs to the experts
            (``experts...``) or to the router (``router...``) has a first dimension of E.
        groups: The experts of each new one.
        counts_E: Tokens that each expert has served, by which the members of a group are weighted; where none of them
            has served any they weigh the same.

    Returns:
        The same names; tensors of experts and router have a first dimension of G.
    """
    num_experts, mixing_GE = len(counts_E), _mixing(groups, counts_E)
    made = {}
    for name, tensor in weights.items():
        if not name.startswith(("experts.", "router.")):
            made[name] = tensor
            continue
        assert len(tensor) == num_experts, f"{name} has {len(tensor)} rows for {num_experts} experts"
        rows = [
            tensor[group[0]] if len(group) == 1 else torch.tensordot(mixing_E.double(), tensor.double(), 1)
            for group, mixing_E in zip(groups, mixing_GE, strict=True)
        ]
        made[name] = torch.stack([row.to(tensor.dtype) for row in rows])
    return made


def _mixing(groups: Groups, counts_E: Tensor) -> Tensor:
    """Weights of the old experts in the new ones, fp64 ``[G, E]``; rows add up to 1."""
    mixing_GE = torch.zeros(len(groups), len(counts_E), dtype=torch.float64)
    for row, group in enumerate(groups):
        own = counts_E[list(group)].double()
        mixing_GE[row, list(group)] = own / own.sum() if own.sum() > 0 else torch.full_like(own, 1 / len(group))
    return mixing_GE


def _most_used(counts_E: Tensor, pool: Sequence[int], keep: int) -> list[int]:
    ranked = sorted(pool, key=lambda expert: (-float(counts_E[expert]), expert))
    return sorted(ranked[:keep])
