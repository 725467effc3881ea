"""Sums over the keys of each query, with gradients: what contrastive losses are made of.

Shapes: B queries of this replica, n keys of a block, h x w a tile, P projection size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnivl.objectives.positives import Positives
from omnivl.objectives.spread_keys import KeyBlock, OldKeys, SpreadKeys
from omnivl.objectives.tile_sums import LogSum, Matrix, Sums, below_pairs, merged
from omnivl.objectives.tiles import LOG2E, Tile, TileGradients, host_sees, is_plain, strips, tile_elements


@dataclass(frozen=True)
class Problem:
    """What sums over keys depend on and has no gradient.

    Attributes:
        identity: Of the queries, int64 ``[B]``.
        batch: The keys of the batch.
        both: Whether the keys are queries, too: the sums over all queries are found for each of them.
        pairs_only: As in ``pair_contrast``.
        every: Whether the sum of all logits is wanted.
        log_weight: Log of the weight of a negative of the batch.
        old: Further keys of the queries and, where the batch's keys are queries, of these; none, or for each side.
        teacher: Queries of a teacher, of the first side.
    """

    identity: Tensor
    batch: SpreadKeys
    both: bool = False
    pairs_only: bool = False
    every: bool = False
    log_weight: float | None = None
    old: tuple[OldKeys, ...] = ()
    teacher: Tensor | None = None

    def batch_blocks(self, beside: Tensor | None = None) -> Iterator[KeyBlock]:
        """The blocks of the batch. Called by every replica."""
        for block in self.batch.blocks(beside):
            yield replace(block, log_weights=self.log_weight)

    def sides(self, query: Tensor, own: Tensor | None, scaled: Tensor, scaled_own: Tensor | None) -> list["_Side"]:
        """The queries, and the batch's own keys where these are compared with old keys."""
        sides = [_Side(query, scaled, self.identity)]
        if own is not None and scaled_own is not None:
            sides.append(_Side(own, scaled_own, self.batch.identity))
        return sides

    def numbers(self, side: "_Side", block: KeyBlock) -> tuple[Tensor, Tensor]:
        """Numbers of queries ``[B]`` and of a block's keys ``[n]`` that are equal for positives."""
        if not self.pairs_only:
            return side.identity, block.identity
        first = self.batch.first
        return torch.arange(first, first + len(side.identity), device=side.identity.device), block.places

    def positives(self, side: "_Side", block: KeyBlock) -> Positives | None:
        """The positives of a block by groups; None where a mask of each tile finds them."""
        large = len(side.query) * len(block.keys) > tile_elements(side.query)
        plain = block.log_weights is None and side.query.dim() == block.keys.dim() == 2
        return Positives(block, *self.numbers(side, block)) if plain and large else None


class _Side(NamedTuple):
    """Queries ``[B, P]`` or ``[B, M, P]``, the same times what makes logits in bits of products, and identities."""

    query: Tensor
    scaled: Tensor
    identity: Tensor


class KeySums(NamedTuple):
    """Sums of logits over the keys of each query, by side: S is 1, or 2 where the batch's keys are queries as well.

    Attributes:
        log_sum: Log of the normaliser, fp64 ``[S, B]``.
        positive: Sum over positives, fp64 ``[S, B]``.
        every: Sum over all keys, fp64 ``[S, B]``; None where not wanted.
        taught: Mean under a teacher's softmax, fp64 ``[S, B]``; None without one.
        counts: Number of positives, fp64 ``[S, B]``; no gradient.
        right: Whether the nearest key of the batch has the query's identity, bool ``[S, B]``.
    """

    log_sum: Tensor
    positive: Tensor
    every: Tensor | None
    taught: Tensor | None
    counts: Tensor
    right: Tensor


def key_sums(query: Tensor, scale: Tensor, problem: Problem) -> KeySums:
    """Of the queries, and of the batch's own keys where these are queries as well."""
    return KeySums(*_Summed.apply(query, problem.batch.own, scale, problem))  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    """Gives what ``KeySums`` has. Saves the queries and a figure of each query and key."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, own: Tensor, scale: Tensor, problem: Problem) -> tuple[Tensor | None, ...]:
        bits = scale * LOG2E
        scaled, scaled_own = query * bits, own * bits if len(problem.old) > 1 else None
        taught = None if problem.teacher is None else problem.teacher * bits
        bound = below_pairs(scaled, own)
        sides = problem.sides(query, own, scaled, scaled_own)
        found, teacher_sum = [Sums(len(query), bound)], LogSum(len(query))

        def add(block: KeyBlock, at: int = 0, columns: Sums | None = None) -> None:
            side, rows = sides[at], found[at]
            matrix, positives = Matrix(rows, columns), problem.positives(side, block)
            if positives is not None and not positives.none:
                rows.positive.add(slice(None), (positives.by_query(block.keys) * side.scaled).sum(-1))
                rows.counts.add(slice(None), positives.by_query(torch.ones_like(block.identity)))
                if columns is not None:
                    columns.positive.add(slice(None), (positives.by_key(side.scaled) * block.keys).sum(-1))
                    columns.counts.add(slice(None), positives.by_key(torch.ones_like(side.identity)))
            for _, tiles in strips(side.query, block):
                for tile in tiles:
                    logits, mask = tile.logits(side.scaled), None
                    largest = None
                    if block.first is not None:
                        largest = matrix.largest(tile, logits, places=True)
                        matrix.meet(tile, logits, largest, side.identity, problem.batch.first, block)
                    if positives is None:
                        mask = tile.positive(*problem.numbers(side, block))
                        kept = logits * mask
                        for one, part, dim in matrix.sides(tile):
                            one.positive.add(part, kept.sum(dim))
                            one.counts.add(part, mask.sum(dim, dtype=torch.float32))
                    if problem.every:
                        for one, part, dim in matrix.sides(tile):
                            one.every.add(part, logits.sum(dim))
                    if taught is not None:
                        soft = tile.allowed(tile.logits(taught))
                        teacher_sum.add(tile.rows, soft, soft.amax(1), logits)
                    weighted = tile.weighted(logits, mask)
                    if largest is None or weighted is not logits:
                        largest = matrix.largest(tile, weighted)
                    matrix.add_powers(tile, weighted, largest)

        def packed(block: KeyBlock) -> Tensor:
            columns = Sums(len(block.keys), block.beside)
            add(block, 0, columns)
            return columns.packed(query)

        if problem.both:
            found.append(Sums.unpacked(problem.batch.merge(map(packed, problem.batch_blocks(bound)), merged)))
        else:
            for block in problem.batch_blocks():
                add(block)
        for at, old in enumerate(problem.old):
            add(old.block(), at)
        normaliser = _by_side([one.log_sum.value(query) for one in found])
        made = (
            normaliser / LOG2E,
            _by_side([one.positive.value(query) for one in found]) / LOG2E,
            _by_side([one.every.value(query) for one in found]) / LOG2E if problem.every else None,
            None if taught is None else teacher_sum.mean(query)[None] / LOG2E,
            _by_side([one.counts.value(query) for one in found]),
            _by_side([one.nearest.has_identity(query) for one in found]),
        )
        ctx.mark_non_differentiable(*made[4:])
        ctx.set_materialize_grads(False)
        teacher_z = None if taught is None else teacher_sum.value(query).float()[:, None]
        ctx.save_for_backward(query, own if len(sides) > 1 else None, scale, scaled, scaled_own, normaliser, teacher_z)
        ctx.problem = problem
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, None]:
        query, own, scale, scaled, scaled_own, normaliser, teacher_z = ctx.saved_tensors
        problem: Problem = ctx.problem
        taught = None if problem.teacher is None else problem.teacher * (scale * LOG2E)
        of_teacher = None if gradients[3] is None else gradients[3][0].float()[:, None]
        packed = _Pull.packed(normaliser, *gradients[:3])
        sides, pulls = problem.sides(query, own, scaled, scaled_own), [_Pull.of(one) for one in packed]
        products = [TileGradients(side.query) for side in sides]  # without the factor scale, as the gradients of keys

        def add(block: KeyBlock, at: int = 0, *, for_keys: bool = False) -> Tensor | None:
            side, rows = sides[at], pulls[at]
            columns = None if block.beside is None else _Pull.of(block.beside)
            positives = problem.positives(side, block)
            plain = is_plain(rows.log_sum) and (columns is None or is_plain(columns.log_sum))

            def of_tile(tile: Tile) -> Tensor:
                logits, mask, across, down = tile.logits(side.scaled), None, rows.part(tile.rows), None
                if columns is not None:
                    down = columns.part(tile.columns)
                if positives is None:
                    mask = tile.positive(*problem.numbers(side, block))
                weighted = tile.weighted(logits, mask)
                if plain:
                    made = weighted.exp2_().mul_(_outer(across.plain, None if down is None else down.plain))
                else:
                    made = across.shares(weighted, 1)
                    if down is not None:
                        made += down.shares(weighted, 0)
                if taught is not None and of_teacher is not None:
                    soft = tile.allowed(tile.logits(taught)) - teacher_z[tile.rows]
                    made += soft.exp2_().mul_(of_teacher[tile.rows])
                if mask is not None:
                    made += mask * _outer(across.positive, None if down is None else down.positive)
                if across.every is not None:
                    made += _outer(across.every, None if down is None else down.every)
                return made

            of_keys = products[at].of_block(block, of_tile, of_keys=for_keys)
            if positives is not None and not positives.none:
                of_query = products[at].total()
                of_query.add_(positives.by_query(block.keys) * rows.positive[:, None])
                if of_keys is not None:
                    of_keys += positives.by_key(rows.positive[:, None] * side.query)
                if columns is not None:
                    assert of_keys is not None
                    of_query.add_(positives.by_query(columns.positive[:, None] * block.keys))
                    of_keys += columns.positive[:, None] * positives.by_key(side.query)
            return of_keys

        def of_batch(block: KeyBlock) -> Tensor:
            made = add(block, for_keys=True)
            assert made is not None
            return made

        of_own: Tensor | None = None
        blocks = problem.batch_blocks(packed[1] if problem.both else None)
        if problem.both or ctx.needs_input_grad[1]:
            of_own = problem.batch.sum_gradients(map(of_batch, blocks))
        else:
            for block in blocks:
                add(block)
        for at, old in enumerate(problem.old):
            add(old.block(), at)
        made = [one.total() for one in products]
        of_scale = (made[0] * query).sum()
        if len(made) > 1:
            assert of_own is not None
            of_scale, of_own = of_scale + (made[1] * own).sum(), of_own + made[1]
        return made[0] * scale, None if of_own is None else of_own * scale, of_scale, None


def _by_side(found: Sequence[Tensor]) -> Tensor:
    """``[S, B]`` of ``[B]`` of each side."""
    return found[0][None] if len(found) == 1 else torch.stack(list(found))


class _Pull(NamedTuple):
    """What pulls at the logits of some queries, fp32: normalisers in bits, and gradients by the sums of a query.

    Attributes:
        log_sum: Normalisers.
        softmax: Gradients by these.
        positive: Gradients by sums over positives.
        plain: ``softmax`` over the normaliser itself; None where the host would have to wait to see that it fits.
        every: Gradients by sums over all keys, if any.
    """

    log_sum: Tensor
    softmax: Tensor
    positive: Tensor
    plain: Tensor | None
    every: Tensor | None

    @staticmethod
    def packed(log_sum: Tensor, softmax: Tensor | None, positive: Tensor | None, every: Tensor | None) -> Tensor:
        """Side by side, fp32 ``[S, B, n]``, from fp64 ``[S, B]``; no gradient is 0, but for ``every``."""
        made = [log_sum, *(torch.zeros_like(log_sum) if one is None else one for one in (softmax, positive))]
        if host_sees(log_sum):
            made.append(made[1] * (-log_sum).exp2())
        return torch.stack(made if every is None else [*made, every], -1).float()

    @classmethod
    def of(cls, packed: Tensor) -> "_Pull":
        """Of ``packed [B, n]``."""
        log_sum, softmax, positive, *others = packed.unbind(1)
        plain = others.pop(0) if host_sees(packed) else None
        return cls(log_sum, softmax, positive, plain, others.pop() if others else None)

    def part(self, which: slice) -> "_Pull":
        """Of some of them."""
        return _Pull(*(None if one is None else one[which] for one in self))  # type: ignore[arg-type]

    def shares(self, logits: Tensor, dim: int) -> Tensor:
        """The gradient of their logits by their normalisers; they are not ``dim`` of these."""
        return (logits - self.log_sum.unsqueeze(dim)).exp2_().mul_(self.softmax.unsqueeze(dim))


def _outer(across: Tensor | None, down: Tensor | None) -> Tensor:
    """``[h, w]`` or ``[h, 1]``, the sum of what belongs to rows and to columns."""
    assert across is not None
    return across[:, None] if down is None else across[:, None] + down
