"""What is summed over the rows and the columns of tiles, and what is largest in them.

Logits are in bits, ``log2(e)`` times the usual ones: on a CPU powers of 2 take a third of the time of those of e. Where
nothing can overflow, a tile's powers are computed once and serve the sums of its rows and of its columns.

Shapes: B queries, n keys of a block, h x w a tile.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from omnivl.objectives.spread_keys import KeyBlock
from omnivl.objectives.tiles import LOWEST, Tile, host_sees, is_plain, pair_products


class Total:
    """A number of each of some queries, added up part by part: in fp64, as many tiles would add up many roundings.

    While one part is all there is, it is that part itself, which takes no operation.

    Attributes:
        found: ``[B]``; None before the first part.
    """

    def __init__(self, count: int, found: Tensor | None = None) -> None:
        """Of B queries."""
        self._count, self.found = count, found

    def add(self, part: slice, values: Tensor) -> None:
        """Takes the numbers of some of the queries."""
        if self.found is None and len(values) == self._count:
            self.found = values
            return
        if self.found is None:
            self.found = values.new_zeros(self._count, dtype=torch.float64)
        self.found = self.found.double()
        self.found[part].add_(values)

    def value(self, like: Tensor) -> Tensor:
        """fp64 ``[B]``, on the device of ``like``; 0 where there is no part."""
        if self.found is None:
            return like.new_zeros(self._count, dtype=torch.float64)
        return self.found.double()


class LogSum:
    """``log2 sum_k 2**l_k`` of each query, added up tile by tile; the mean of some values under that softmax too.

    Attributes:
        plain: Sums of powers that fit as they are.
    """

    def __init__(self, count: int, log: Tensor | None = None) -> None:
        """Of B queries."""
        self._count, self._log, self._mean, self.plain = count, log, Total(count), Total(count)

    def add(self, part: slice, logits: Tensor, largest: Tensor, values: Tensor | None = None, *, dim: int = 1) -> None:
        """Takes a tile.

        Args:
            part: Which queries.
            logits: Of these, finite; they are not ``dim``.
            largest: The largest logit of each.
            values: What is averaged, of the shape of ``logits``.
            dim: That of the keys.
        """
        powers = (logits - largest.unsqueeze(dim)).exp2_()
        total = powers.sum(dim).double()
        log, mean = total.log2() + largest, None
        if values is not None:
            mean = powers.mul_(values).sum(dim) / total
        if self._log is None and len(log) == self._count:
            self._log = log
            if mean is not None:
                self._mean.add(part, mean)
            return
        if self._log is None:
            self._log = log.new_full((self._count,), LOWEST)
        together = torch.logaddexp2(self._log[part], log)
        if mean is not None:
            share = (log - together).exp2_()
            self._mean.add(part, (mean - self._mean.value(mean)[part]) * share)
        if len(log) == self._count:
            self._log = together
        else:
            self._log[part] = together

    def value(self, like: Tensor) -> Tensor:
        """fp64 ``[B]``, on the device of ``like``; where there is nothing, a number so low that its power is 0."""
        if self.plain.found is None:
            return like.new_full((self._count,), LOWEST, dtype=torch.float64) if self._log is None else self._log
        plain = self.plain.found.double().log2()
        return plain if self._log is None else torch.logaddexp2(plain, self._log)

    def mean(self, like: Tensor) -> Tensor:
        """The mean of the values, fp64 ``[B]``."""
        return self._mean.value(like)


class Largest(NamedTuple):
    """The largest logit of each query of a tile, and at which key it is; None: not looked for yet."""

    logit: Tensor
    key: Tensor | None


class Nearest:
    """The nearest key of each query, the first of the joined batch where some are equally near.

    Attributes:
        logit: Its logit, ``[B]``; None before the first tile.
        place: Twice the key's index in the joined batch, and 1 more where it has the query's identity.
    """

    def __init__(self, count: int, at_least: Tensor | None = None) -> None:
        """Of B queries; ``at_least`` is a bound that the nearest key's logit is not below."""
        self._count = count
        self.logit = None if at_least is None else at_least.clone()
        self.place: Tensor | None = None

    def add(
        self, part: slice, logits: Tensor, largest: Largest, of_queries: Tensor, of_keys: Tensor, first: int
    ) -> None:
        """Takes a tile.

        Args:
            part: Which queries.
            logits: Of these queries by keys.
            largest: Of these queries.
            of_queries: Identities of these queries.
            of_keys: Identities of the keys.
            first: Index of the first of the keys in the joined batch.
        """
        if self.logit is None and largest.key is not None and len(largest.key) == self._count:
            self.logit, self.place = largest.logit, _places(largest.key, of_queries, of_keys, first)
            return
        if self.logit is None:
            self.logit = logits.new_full((self._count,), float("-inf"))
        if self.place is None:
            self.place = torch.full_like(self.logit, torch.iinfo(torch.int64).max, dtype=torch.int64)
        logit, place = self.logit[part], self.place[part]
        # Most tiles have nearer keys for few queries. An accelerator does not ask.
        which: Tensor | slice = slice(None)
        if host_sees(logits):
            which = (largest.logit >= logit).nonzero()
            if len(which) == 0:
                return
            which = which.squeeze(1)
        found, key = largest
        if key is None:
            found, key = logits[which].max(1)
        places = _places(key, of_queries[which], of_keys, first)
        before, at = logit[which], place[which]
        equally = torch.where(found == before, torch.minimum(places, at), at)
        place[which] = torch.where(found > before, places, equally)
        logit[which] = torch.maximum(found, before)

    def has_identity(self, like: Tensor) -> Tensor:
        """Whether it has the query's identity, bool ``[B]``; false for all where there were no tiles."""
        if self.place is None:
            return like.new_zeros(self._count, dtype=torch.bool)
        return self.place % 2 == 1


def _places(key: Tensor, of_queries: Tensor, of_keys: Tensor, first: int) -> Tensor:
    """``Nearest.place`` of the keys of a tile whose first one has this index."""
    return torch.add(of_keys[key] == of_queries, key + first if first else key, alpha=2)


class Sums:
    """Of each of B queries, what is summed over the keys: of a side of the matrix, its rows or its columns."""

    def __init__(self, count: int, at_least: Tensor | None = None) -> None:
        """Nothing yet.

        Args:
            count: B.
            at_least: A bound that the logit of each query's nearest key is not below: fewer keys are then looked at.
        """
        self.log_sum, self.nearest = LogSum(count), Nearest(count, at_least)
        self.positive, self.counts, self.every = (Total(count) for _ in range(3))

    def packed(self, like: Tensor) -> Tensor:
        """All that replicas add up, fp64 ``[B, n]``: the logarithm, the nearest key's logit, sums, that key's place."""
        near = self.nearest
        assert near.logit is not None
        assert near.place is not None, "each query meets a key"
        totals = [self.positive, self.counts] if self.every.found is None else [self.positive, self.counts, self.every]
        sums = (one.value(like) for one in totals)
        return torch.stack([self.log_sum.value(like), near.logit.double(), *sums, near.place.double()], 1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Sums":
        """The inverse of ``packed``."""
        sums, count = cls(len(packed)), len(packed)
        log, sums.nearest.logit, positive, counts, *every, sums.nearest.place = packed.unbind(1)
        sums.log_sum, sums.positive, sums.counts = LogSum(count, log), Total(count, positive), Total(count, counts)
        sums.every = Total(count, *every)
        return sums


def merged(packed: Tensor) -> Tensor:
    """Of several ``packed`` sums over different keys, ``[S, B, n]``, those over all of them, ``[B, n]``."""
    largest = packed[..., :2].amax(0)
    log, logit = largest.unbind(1)
    log = log + (packed[..., 0] - log).exp2_().sum(0).log2()
    place = packed[..., -1].masked_fill(packed[..., 1] < logit, float("inf")).amin(0)
    return torch.cat([log[:, None], logit[:, None], packed[..., 2:-1].sum(0), place[:, None]], 1)


class Matrix:
    """The sums of both sides of a block's part of the matrix, or of its rows alone."""

    def __init__(self, rows: Sums, columns: Sums | None) -> None:
        """Adds to these: ``rows`` of all queries, ``columns`` of the block's keys."""
        self._rows, self._columns = rows, columns

    def sides(self, tile: Tile) -> list[tuple[Sums, slice, int]]:
        """Of each side its sums, which of them a tile concerns, and along which dimension of the tile they go."""
        rows = (self._rows, tile.rows, 1)
        return [rows] if self._columns is None else [rows, (self._columns, tile.columns, 0)]

    def largest(self, tile: Tile, logits: Tensor, *, places: bool = False) -> list[Largest]:
        """The largest logit of each row, and of each column where these are summed.

        Args:
            tile: The tile.
            logits: Its logits.
            places: Whether keys will be looked for; where the host sees which tiles have none, this is put off.
        """
        dims = [dim for _, _, dim in self.sides(tile)]
        if places and not host_sees(logits):
            return [Largest(*logits.max(dim)) for dim in dims]
        return [Largest(logits.amax(dim), None) for dim in dims]

    def meet(
        self, tile: Tile, logits: Tensor, largest: list[Largest], identity: Tensor, first: int, block: KeyBlock
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

    def add_powers(self, tile: Tile, logits: Tensor, largest: list[Largest]) -> None:
        """Takes the logits of normalisers, and may overwrite them; ``largest`` of these."""
        if is_plain(*(one.logit for one in largest)):
            powers = logits.exp2_()
            for side, part, dim in self.sides(tile):
                side.log_sum.plain.add(part, powers.sum(dim))
        else:
            for (side, part, dim), limit in zip(self.sides(tile), largest, strict=True):
                side.log_sum.add(part, logits, limit.logit, dim=dim)


def below_pairs(query: Tensor, keys: Tensor) -> Tensor | None:
    """A bound that the product of query i and key i is not below, however it is rounded, ``[B]``.

    None where the host would have to wait to make use of it.
    """
    if not host_sees(query):
        return None
    size, other = (one.norm(dim=-1).view(len(one), -1).amax(1) for one in (query, keys))
    return torch.sub(pair_products(query, keys), size * other, alpha=1e-4)
