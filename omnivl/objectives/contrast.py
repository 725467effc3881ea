"""Contrast of queries with keys by tiles: the matrix of their similarities never exists as a whole.

With logits ``l_ik = scale * q_i . k_k``, targets ``t_ik`` and weights ``w_ik`` (1 for positives) the loss of query i is

    loss_i = sum_k t_ik (z_i - l_ik),   z_i = log sum_k w_ik exp(l_ik)

The forward pass goes over tiles of the matrix and keeps sums by query, the backward pass computes each tile anew:
memory grows with the numbers of queries and of keys, not with their product. Where pictures and texts are queries and
keys of one another, a tile serves both directions: its rows are pictures, its columns texts.

Shapes: B samples of this replica, R replicas, J = R * B keys of the joined batch, Q keys of a queue, n keys of a block,
P projection size, M embeddings of a sample that has several.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.objectives.key_sums import KeySums, Problem, key_sums
from omnivl.objectives.spread_keys import KeyBlock, OldKeys, SpreadKeys
from omnivl.objectives.tile_sums import Matrix, Sums, below_pairs, merged
from omnivl.objectives.tiles import Tile, TileGradients, pair_products, strips

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Teacher:
    """The queries of the momentum model, fp32 ``[B, P]``, whose softmax over all keys is a part of the target.

    Attributes:
        query: The queries; no gradient.
        alpha: Share of the target, scalar.
    """

    query: Tensor
    alpha: Tensor


class Contrasted(NamedTuple):
    """Of each query ``[B]``: its loss, whether its nearest key of the batch has its identity, number of positives."""

    loss: Tensor
    nearest_is_positive: Tensor
    positives: Tensor


def softmax_contrast(
    query: Tensor,
    identity: Tensor,
    batch: SpreadKeys,
    scale: Tensor,
    *,
    reduction: Reduction = "mean",
    log_weight: float | None = None,
    old: OldKeys | None = None,
    teacher: Teacher | None = None,
) -> Contrasted:
    """The softmax loss of each query over the keys of all replicas and of a queue. Called by every replica.

    Valid keys of a query's identity are its positives. The gradient of the own keys is summed over replicas: every
    replica's loss depends on every replica's keys. With gradients averaged over replicas the result equals one process
    that holds the joined batch.

    Args:
        query: fp32 ``[B, P]`` or ``[B, M, P]``, L2-normalised; equally many on every replica.
        identity: int64 ``[B]``.
        batch: The keys of the batch.
        scale: 1 / temperature, fp32 scalar.
        reduction: Whether the terms of a query's positives are averaged or summed. A query without one has none.
        log_weight: Log of the weight of a negative of the batch; None: 0.
        old: Further keys.
        teacher: Soft targets: ``alpha * softmax(scale teacher.query . k) + (1 - alpha) * hard targets``.
    """
    taught = None if teacher is None else teacher.query
    older = () if old is None else (old,)
    found = key_sums(query, scale, Problem(identity, batch, log_weight=log_weight, old=older, teacher=taught))
    made = _contrasted(found, reduction, soft=None if teacher is None else teacher.alpha)
    return Contrasted(*(one.squeeze(0) for one in made))


def pair_contrast(
    visual: SpreadKeys,
    text: SpreadKeys,
    scale: Tensor,
    *,
    reduction: Reduction = "mean",
    pairs_only: bool = False,
    label_smoothing: float = 0.0,
    log_weight: float | None = None,
    old: tuple[OldKeys, OldKeys] | None = None,
) -> tuple[Contrasted, Contrasted]:
    """Pictures against all texts, and texts against all pictures, from the same tiles. Called by every replica.

    Losses, positives and gradients as in ``softmax_contrast``; the gradient of a sample's embedding is that of a query
    and of a key together.

    Args:
        visual: Pictures or clips.
        text: The texts of the same samples.
        scale: 1 / temperature, fp32 scalar.
        reduction: As in ``softmax_contrast``.
        pairs_only: The only positive of a sample is its own partner, whatever identities are. Without old keys.
        label_smoothing: Share of the target that is spread over all keys of the batch. Without old keys.
        log_weight: Log of the weight of a negative of the batch; None: 0.
        old: Further visual keys, for texts, and textual ones, for pictures.
    """
    assert old is None or not (pairs_only or label_smoothing)
    every = label_smoothing > 0.0
    older = () if old is None else (old[1], old[0])
    found = key_sums(visual.own, scale, Problem(text.identity, text, True, pairs_only, every, log_weight, older))
    made = _contrasted(found, reduction, label_smoothing, text.count)
    of_visual, of_text = zip(*(one.unbind() for one in made), strict=True)
    return Contrasted(*of_visual), Contrasted(*of_text)


class Nearest(NamedTuple):
    """Whether the nearest key of each picture or clip, and of each text, has its identity, bool ``[B]`` each."""

    of_visual: Tensor
    of_text: Tensor


@torch.no_grad()
def nearest_is_positive(visual: SpreadKeys, text: SpreadKeys) -> Nearest:
    """Recalls of pictures among texts and of texts among pictures. Called by every replica."""
    return _nearest(visual.own.detach(), visual, text)


def sigmoid_contrast(visual: SpreadKeys, text: SpreadKeys, scale: Tensor, bias: Tensor) -> tuple[Tensor, Nearest]:
    """``- sum_j log sigmoid(z_ij (scale v_i . t_j + bias))`` of each picture ``[B]``, z 1 for its pair, else -1.

    The pair of picture i is text i of the same replica. Gradients as in ``softmax_contrast``. Called by every replica.

    As -log sigmoid(l) = softplus(l) - l and -log sigmoid(-l) = softplus(l), the sum is that of softplus over all logits
    minus the logit of the pair.

    Args:
        visual: Pictures or clips.
        text: The texts of the same samples.
        scale: fp32 scalar.
        bias: fp32 scalar.
    """
    total, *nearest = _SoftplusSums.apply(visual.own, text.own, scale, bias, visual, text)  # type: ignore[no-untyped-call]
    pair = scale * pair_products(visual.own, text.own) + bias
    return (total - pair).float(), Nearest(*nearest)


def _contrasted(
    sums: KeySums, reduction: Reduction, smoothing: float = 0.0, count: int = 1, soft: Tensor | None = None
) -> Contrasted:
    """The losses of each side ``[S, B]``, by the share of the target that is spread over all ``count`` keys.

    Or by the share ``soft`` that a teacher has. A query without a target has no loss: its sums are finite.
    """
    has_positive = sums.counts > 0
    hard = has_positive / sums.counts.clamp(min=1) if reduction == "mean" else has_positive.double()
    spread = smoothing if soft is None else soft
    if not isinstance(spread, float) or spread > 0.0:
        hard = hard * (1.0 - spread)
    targets, followed = hard * sums.counts, hard * sums.positive
    if sums.every is not None:
        targets, followed = targets + smoothing, followed + smoothing / count * sums.every
    if sums.taught is not None and soft is not None:
        targets, followed = targets + soft, followed + soft * sums.taught
    loss = targets * sums.log_sum - followed
    return Contrasted(loss.float(), sums.right, sums.counts.float())


class _SoftplusSums(torch.autograd.Function):
    """By picture the sum of ``softplus(scale v_i . t_j + bias)`` over all texts, fp64 ``[B]``, and ``Nearest``."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, own: Tensor, scale: Tensor, bias: Tensor, visual: SpreadKeys, text: SpreadKeys
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query, scale, bias)
        ctx.text = text
        scaled = query * scale
        total = query.new_zeros(len(query), dtype=torch.float64)

        def add(tile: Tile, logits: Tensor) -> None:
            total[tile.rows] += F.softplus(logits.add_(bias)).sum(-1)

        nearest = _nearest(scaled, visual, text, add)
        ctx.mark_non_differentiable(*nearest)
        return total, *nearest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        query, scale, bias = ctx.saved_tensors
        scaled, gradient = query * scale, gradients[0].float()
        of_bias = gradient.new_zeros((), dtype=torch.float64)
        products = TileGradients(query)

        def of_tile(tile: Tile) -> Tensor:
            made = tile.logits(scaled).add_(bias).sigmoid_().mul_(gradient[tile.rows, None])
            of_bias.add_(made.sum())
            return made

        def of_block(block: KeyBlock) -> Tensor:
            made = products.of_block(block, of_tile, of_keys=True)
            assert made is not None
            return made

        of_own = ctx.text.sum_gradients(map(of_block, ctx.text.blocks()))
        of_query = products.total()
        return of_query * scale, of_own * scale, (of_query * query).sum(), of_bias.float(), None, None


def _nearest(
    scaled: Tensor, visual: SpreadKeys, text: SpreadKeys, see: Callable[[Tile, Tensor], None] | None = None
) -> Nearest:
    """``nearest_is_positive``; ``see`` gets each tile with its products, and may overwrite these."""
    bound = below_pairs(scaled, text.own.detach())
    rows = Sums(len(scaled), bound)

    def found(block: KeyBlock) -> Tensor:
        columns = Sums(len(block.keys), block.beside)
        matrix = Matrix(rows, columns)
        for _, tiles in strips(scaled, block):
            for tile in tiles:
                logits = tile.logits(scaled)
                largest = matrix.largest(tile, logits, places=True)
                matrix.meet(tile, logits, largest, visual.identity, visual.first, block)
                if see is not None:
                    see(tile, logits)
        return columns.packed(scaled)

    columns = Sums.unpacked(text.merge((found(block) for block in text.blocks(bound)), merged))
    return Nearest(rows.nearest.has_identity(scaled), columns.nearest.has_identity(scaled))
