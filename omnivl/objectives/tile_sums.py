"""What is summed over the rows and the columns of tiles, and what is largest in them.

Logits are in bits, ``log2(e)`` times the usual ones: on a CPU powers of 2 take a third of the time of those of e. Where
nothing can overflow, a tile's powers are computed once and serve the sums of its rows and of its columns.

Shapes: B queries, n keys of a block, h x w a tile.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
"""

import torch
from torch import Tensor

from omnivl.objectives.spread_keys import KeyBlock
from omnivl.objectives.tiles import Tile, host_sees, is_plain, pair_products

_LOWEST = torch.finfo(torch.float32).min


class LogSum:
    """``log2 sum_k 2**l_k`` of each query, added up tile by tile; the mean of some values under that softmax too."""

    def __init__(self, like: Tensor, count: int) -> None:
        # fp64: many tiles would add up many roundings.
        self.plain, self.total, self.largest, self.followed = like.new_zeros((4, count), dtype=torch.float64).unbind()
        self.largest.fill_(_LOWEST)

    def add(self, part: slice, logits: Tensor, largest: Tensor, values: Tensor | None = None, *, dim: int = 1) -> None:
        """Takes a tile.

        Args:
            part: Which queries.
            logits: Of these; they are not ``dim``.
            largest: The largest logit of each.
            values: What is averaged, of the shape of ``logits``.
            dim: That of the keys.
        """
        # A row of minus infinities alone stays finite, so that its powers are 0.
        largest = largest.clamp(min=_LOWEST)
        powers = (logits - largest.unsqueeze(dim)).exp2_()
        before, largest = self.largest[part], largest.double()
        together = torch.maximum(before, largest)
        old, new = (before - together).exp2(), (largest - together).exp2()
        self.total[part] = self.total[part] * old + powers.sum(dim) * new
        if values is not None:
            self.followed[part] = self.followed[part] * old + powers.mul_(values).sum(dim) * new
        self.largest[part] = together

    def value(self) -> Tensor:
        """fp64 ``[B]``; where there is nothing, a number so low that its power is 0."""
        shifted = self.largest + self.total.log2()
        return torch.logaddexp2(self.plain.log2(), shifted).clamp_(min=_LOWEST)

    def mean(self) -> Tensor:
        """The mean of the values, fp64 ``[B]``."""
        return self.followed / self.total


class Nearest:
    """The nearest key of each query, the first of the joined batch where some are equally near."""

    def __init__(self, like: Tensor, count: int, at_least: Tensor | None) -> None:
        # Twice the key's index in the joined batch, and 1 more where it has the query's identity.
        self.place = like.new_full((count,), float("inf"), dtype=torch.float64)
        self.logit = torch.full_like(self.place, float("-inf"), dtype=torch.float32)
        if at_least is not None:
            self.logit.copy_(at_least)

    def add(
        self, part: slice, logits: Tensor, largest: Tensor, of_queries: Tensor, of_keys: Tensor, first: int
    ) -> None:
        """Takes a tile.

        Args:
            part: Which queries.
            logits: Of these queries by keys.
            largest: The largest of each query.
            of_queries: Identities of these queries.
            of_keys: Identities of the keys.
            first: Index of the first of the keys in the joined batch.
        """
        logit, place = self.logit[part], self.place[part]
        # Most tiles have nearer keys for few queries. An accelerator does not ask.
        which: Tensor | slice = slice(None)
        if host_sees(logits):
            which = (largest >= logit).nonzero()
            if len(which) == 0:
                return
            which = which.squeeze(1)
        found, column = logits[which].max(1)
        places = 2.0 * (column + first) + (of_keys[column] == of_queries[which])
        before, at = logit[which], place[which]
        equally = torch.where(found == before, torch.minimum(places, at), at)
        place[which] = torch.where(found > before, places, equally)
        logit[which] = torch.maximum(found, before)

    def has_identity(self) -> Tensor:
        """Whether it has the query's identity, bool ``[B]``."""
        return self.place % 2 == 1


class Sums:
    """Of each of B queries, what is summed over the keys: of a side of the matrix, its rows or its columns."""

    def __init__(self, like: Tensor, count: int, at_least: Tensor | None = None) -> None:
        """Nothing yet; on the device of ``like``.

        Args:
            like: Of the queries.
            count: B.
            at_least: A bound that the logit of each query's nearest key is not below: fewer keys are then looked at.
        """
        self.log_sum, self.nearest = LogSum(like, count), Nearest(like, count, at_least)
        self.positive, self.counts, self.every = like.new_zeros((3, count), dtype=torch.float64).unbind()

    def packed(self) -> Tensor:
        """All that replicas add up, fp64 ``[B, 8]``."""
        found, nearest = self.log_sum, self.nearest
        sums = (found.plain, found.total, self.positive, self.counts, self.every)
        return torch.stack([*sums, found.largest, nearest.logit.double(), nearest.place], 1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Sums":
        """The inverse of ``packed``."""
        sums = cls(packed, 0)
        found, nearest = sums.log_sum, sums.nearest
        found.plain, found.total, sums.positive, sums.counts, sums.every = packed[:, :5].unbind(1)
        found.largest, nearest.logit, nearest.place = packed[:, 5:].unbind(1)
        return sums


def merged(packed: Tensor) -> Tensor:
    """Of several ``packed`` sums over different keys, ``[S, B, 8]``, those over all of them, ``[B, 8]``."""
    largest, nearest = packed[..., 5].amax(0), packed[..., 6].amax(0)
    total = (packed[..., 1] * (packed[..., 5] - largest).exp2()).sum(0)
    first = packed[..., 7].masked_fill(packed[..., 6] < nearest, float("inf")).amin(0)
    plain, _, *sums = packed[..., :5].sum(0).unbind(1)
    return torch.stack([plain, total, *sums, largest, nearest, first], 1)


class Matrix:
    """The sums of both sides of a block's part of the matrix, or of its rows alone."""

    def __init__(self, rows: Sums, columns: Sums | None) -> None:
        """Adds to these: ``rows`` of all queries, ``columns`` of the block's keys."""
        self._rows, self._columns = rows, columns

    def sides(self, tile: Tile) -> list[tuple[Sums, slice, int]]:
        """Of each side its sums, which of them a tile concerns, and along which dimension of the tile they go."""
        rows = (self._rows, tile.rows, 1)
        return [rows] if self._columns is None else [rows, (self._columns, tile.columns, 0)]

    def largest(self, tile: Tile, logits: Tensor) -> list[Tensor]:
        """The largest logit of each row, and of each column where these are summed."""
        return [logits.amax(dim) for _, _, dim in self.sides(tile)]

    def meet(
        self, tile: Tile, logits: Tensor, largest: list[Tensor], identity: Tensor, first: int, block: KeyBlock
    ) -> None:
        """Looks for nearer keys.

        Args:
            tile: Of a block of the batch.
            logits: Its logits, or what grows with them.
            largest: Of these.
            identity: Of all queries.
            first: Index of the first query in the joined batch.
            block: Of the tile.
        """
        assert block.first is not None
        own, other = identity[tile.rows], block.identity[tile.columns]
        at = first + tile.rows.start, block.first + tile.columns.start
        self._rows.nearest.add(tile.rows, logits, largest[0], own, other, at[1])
        if self._columns is not None:
            self._columns.nearest.add(tile.columns, logits.t(), largest[1], other, own, at[0])

    def add_powers(self, tile: Tile, logits: Tensor, largest: list[Tensor]) -> None:
        """Takes the logits of normalisers, and may overwrite them; ``largest`` of these."""
        if is_plain(*largest):
            powers = logits.exp2_()
            for side, part, dim in self.sides(tile):
                side.log_sum.plain[part].add_(powers.sum(dim))
        else:
            for (side, part, dim), limit in zip(self.sides(tile), largest, strict=True):
                side.log_sum.add(part, logits, limit, dim=dim)


def below_pairs(query: Tensor, keys: Tensor) -> Tensor | None:
    """A bound that the product of query i and key i is not below, however it is rounded, ``[B]``.

    None where the host would have to wait to make use of it.
    """
    if not host_sees(query):
        return None
    size, other = (one.norm(dim=-1).view(len(one), -1).amax(1) for one in (query, keys))
    return torch.sub(pair_products(query, keys), size * other, alpha=1e-4)
