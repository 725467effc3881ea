"""Sums over the keys of each query, with gradients: what contrastive losses are made of.

Shapes: B queries of this replica, n keys of a block, h x w a tile, P projection size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnivl.objectives.positives import Positives
from omnivl.objectives.spread_keys import KeyBlock, OldKeys, SpreadKeys
from omnivl.objectives.tile_sums import LogSum, Matrix, Sums, below_pairs, merged
from omnivl.objectives.tiles import LOG2E, Tile, TileGradients, is_plain, strips, tile_elements


@dataclass(frozen=True)
class Problem:
    """What sums over keys depend on and has no gradient.

    Attributes:
        identity: Of the queries, int64 ``[B]``.
        batch: The keys of the batch, if any.
        both: Whether the keys are queries, too: the sums over all queries are found for each of them.
        pairs_only: As in ``pair_contrast``.
        every: Whether the sum of all logits is wanted.
        log_weight: Log of the weight of a negative of the batch.
        old: Further keys.
        teacher: Queries of a teacher.
    """

    identity: Tensor
    batch: SpreadKeys | None = None
    both: bool = False
    pairs_only: bool = False
    every: bool = False
    log_weight: float | None = None
    old: OldKeys | None = None
    teacher: Tensor | None = None

    def batch_blocks(self, beside: Tensor | None = None) -> Iterator[KeyBlock]:
        """The blocks of the batch. Called by every replica."""
        if self.batch is not None:
            for block in self.batch.blocks(beside):
                yield replace(block, log_weights=self.log_weight)

    def numbers(self, block: KeyBlock) -> tuple[Tensor, Tensor]:
        """Numbers of queries ``[B]`` and of a block's keys ``[n]`` that are equal for positives."""
        if not self.pairs_only or self.batch is None:
            return self.identity, block.identity
        first = self.batch.first
        return torch.arange(first, first + len(self.identity), device=self.identity.device), block.places

    def positives(self, block: KeyBlock, query: Tensor) -> Positives | None:
        """The positives of a block by groups; None where a mask of each tile finds them."""
        large = len(query) * len(block.keys) > tile_elements(query)
        plain = block.log_weights is None and query.dim() == block.keys.dim() == 2
        return Positives(block, *self.numbers(block)) if plain and large else None


@dataclass(frozen=True)
class KeySums:
    """Sums of logits over the keys of each query.

    Attributes:
        log_sum: Log of the normaliser, fp64 ``[B]``.
        positive: Sum over positives, fp64 ``[B]``.
        every: Sum over all keys, fp64 ``[B]``; 0 where not wanted.
        taught: Mean under a teacher's softmax, fp64 ``[B]``; 0 without one.
        counts: Number of positives, fp64 ``[B]``; no gradient.
        right: Whether the nearest key of the batch has the query's identity, bool ``[B]``.
    """

    log_sum: Tensor
    positive: Tensor
    every: Tensor
    taught: Tensor
    counts: Tensor
    right: Tensor

    def joined(self, old: "KeySums") -> "KeySums":
        """Over further keys, too, which are not of the batch."""
        log_sum, positive = torch.logaddexp(self.log_sum, old.log_sum), self.positive + old.positive
        return replace(self, log_sum=log_sum, positive=positive, counts=self.counts + old.counts)


def key_sums(query: Tensor, scale: Tensor, problem: Problem) -> list[KeySums]:
    """Of the queries, and of the batch's own keys where these are queries as well."""
    own = None if problem.batch is None else problem.batch.own
    made = _Summed.apply(query, own, scale, problem)  # type: ignore[no-untyped-call]
    return [KeySums(*made[at].unbind(), *made[at + 1 : at + 3]) for at in range(0, len(made), 3)]


class _Summed(torch.autograd.Function):
    """Gives for each side ``[4, B]``, the first four of ``KeySums``, and its last two.

    Saves the queries and a figure of each query and key.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, own: Tensor | None, scale: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        scaled = query * (scale * LOG2E)
        taught = None if problem.teacher is None else problem.teacher * (scale * LOG2E)
        bound = None if own is None else below_pairs(scaled, own)
        rows, teacher_sum = Sums(query, len(query), bound), LogSum(query, len(query))

        def add(block: KeyBlock) -> Sums:
            columns = Sums(query, len(block.keys) if problem.both else 0, block.beside)
            matrix = Matrix(rows, columns if problem.both else None)
            positives = problem.positives(block, query)
            if positives is not None and not positives.none:
                rows.positive += (positives.by_query(block.keys) * scaled).sum(-1)
                rows.counts += positives.by_query(torch.ones_like(block.identity))
                if problem.both:
                    columns.positive += (positives.by_key(scaled) * block.keys).sum(-1)
                    columns.counts += positives.by_key(torch.ones_like(problem.identity))
            for _, tiles in strips(query, block):
                for tile in tiles:
                    logits, mask = tile.logits(scaled), None
                    largest = matrix.largest(tile, logits)
                    if problem.batch is not None and block.first is not None:
                        matrix.meet(tile, logits, largest, problem.identity, problem.batch.first, block)
                    if positives is None:
                        mask = tile.positive(*problem.numbers(block))
                        kept = torch.where(mask, logits, 0.0)
                        for side, part, dim in matrix.sides(tile):
                            side.positive[part] += kept.sum(dim)
                            side.counts[part] += mask.sum(dim)
                    if problem.every:
                        for side, part, dim in matrix.sides(tile):
                            side.every[part] += logits.sum(dim)
                    if taught is not None:
                        soft = tile.allowed(tile.logits(taught))
                        teacher_sum.add(tile.rows, soft, soft.amax(1), logits)
                    if (weighted := tile.weighted(logits, mask)) is not logits:
                        largest = matrix.largest(tile, weighted)
                    matrix.add_powers(tile, weighted, largest)
            return columns

        sides = [rows]
        if problem.batch is not None and problem.both:
            found = problem.batch.merge((add(block).packed() for block in problem.batch_blocks(bound)), merged)
            sides.append(Sums.unpacked(found))
        else:
            for block in problem.batch_blocks():
                add(block)
        if problem.old is not None:
            add(problem.old.block())
        made: list[Tensor] = []
        for side in sides:
            mean = side.every if taught is None else teacher_sum.mean()
            sums = torch.stack([side.log_sum.value(), side.positive, side.every, mean]) / LOG2E
            made += [sums, side.counts, side.nearest.has_identity()]
        ctx.mark_non_differentiable(*(one for at, one in enumerate(made) if at % 3))
        ctx.save_for_backward(query, scale, teacher_sum.value(), *(side.log_sum.value() for side in sides))
        ctx.problem = problem
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        query, scale, teacher_z, *normalisers = ctx.saved_tensors
        problem: Problem = ctx.problem
        scaled = query * (scale * LOG2E)
        taught = None if problem.teacher is None else problem.teacher * (scale * LOG2E)
        of_teacher = gradients[0][3].float()[:, None]
        sides = [torch.stack([z, *sums[:3]], 1) for z, sums in zip(normalisers, gradients[::3], strict=True)]
        rows, of_query = _Pull.of(sides[0]), torch.zeros_like(query)  # without the factor scale, as those of keys

        def add(block: KeyBlock, *, for_keys: bool) -> Tensor:
            columns = None if block.beside is None else _Pull.of(block.beside)
            positives = problem.positives(block, query)
            plain = is_plain(rows.log_sum) and (columns is None or is_plain(columns.log_sum))

            def of_tile(tile: Tile) -> Tensor:
                logits, mask, across, down = tile.logits(scaled), None, rows.part(tile.rows), None
                if columns is not None:
                    down = columns.part(tile.columns)
                if positives is None:
                    mask = tile.positive(*problem.numbers(block))
                weighted = tile.weighted(logits, mask)
                if plain:
                    made = weighted.exp2_().mul_(_outer(across.plain, None if down is None else down.plain))
                else:
                    made = across.shares(weighted, 1)
                    if down is not None:
                        made += down.shares(weighted, 0)
                if taught is not None:
                    soft = tile.allowed(tile.logits(taught)) - teacher_z[tile.rows, None].float()
                    made += soft.exp2_().mul_(of_teacher[tile.rows])
                if mask is not None:
                    made += mask * _outer(across.positive, None if down is None else down.positive)
                if problem.every:
                    made += _outer(across.every, None if down is None else down.every)
                return made

            of_keys = TileGradients(query, of_query, of_keys=for_keys).of_block(block, of_tile)
            if positives is not None and not positives.none:
                pulled = rows.positive[:, None] * query
                of_query.add_(positives.by_query(block.keys) * rows.positive[:, None])
                if for_keys:
                    of_keys += positives.by_key(pulled)
                if columns is not None:
                    of_query.add_(positives.by_query(columns.positive[:, None] * block.keys))
                    of_keys += columns.positive[:, None] * positives.by_key(query)
            return of_keys

        of_own: Tensor | None = None
        blocks = problem.batch_blocks(sides[1] if problem.both else None)
        if problem.batch is not None and (problem.both or ctx.needs_input_grad[1]):
            of_own = problem.batch.sum_gradients(add(block, for_keys=True) for block in blocks) * scale
        else:
            for block in blocks:
                add(block, for_keys=False)
        if problem.old is not None:
            add(problem.old.block(), for_keys=False)
        return of_query * scale, of_own, (of_query * query).sum(), None


class _Pull(NamedTuple):
    """What pulls at the logits of some queries: normalisers in bits, and gradients by three sums of a query, fp32."""

    log_sum: Tensor
    softmax: Tensor
    positive: Tensor
    every: Tensor
    plain: Tensor

    @classmethod
    def of(cls, packed: Tensor) -> "_Pull":
        """Of ``[n, 4]``, fp64."""
        log_sum, softmax, positive, every = packed.unbind(1)
        return cls(*(one.float() for one in (log_sum, softmax, positive, every, softmax * (-log_sum).exp2())))

    def part(self, which: slice) -> "_Pull":
        """Of some of them."""
        return _Pull(*(one[which] for one in self))

    def shares(self, logits: Tensor, dim: int) -> Tensor:
        """The gradient of their logits by their normalisers; they are not ``dim`` of these."""
        return (logits - self.log_sum.unsqueeze(dim)).exp2_().mul_(self.softmax.unsqueeze(dim))


def _outer(across: Tensor, down: Tensor | None) -> Tensor:
    """``[h, w]`` or ``[h, 1]``, the sum of what belongs to rows and to columns."""
    return across[:, None] if down is None else across[:, None] + down
