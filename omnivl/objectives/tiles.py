"""Tiles of the matrix of similarities, and the gradients of queries and keys by theirs.

Shapes: B queries, n keys of a block, h x w a tile, P projection size, M embeddings of a sample that has several.

Source: tiles of a contrastive loss as in Cheng et al., Inf-CL, arXiv 2410.17243.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from omnivl.objectives.spread_keys import KeyBlock
from omnivl.parts.similarity import similarity

LOG2E = math.log2(math.e)
LOWEST = torch.finfo(torch.float32).min
"""The logit of a key that does not count: its power is 0 beside any other, and differences of it are finite."""

_TILE_ELEMENTS = {"cpu": 2**18}
_USUAL_TILE_ELEMENTS = 2**25
_TILE_ROWS = 2**9
_PLAIN_BITS = 80.0  # powers of 2 up to this, and their inverses times a gradient, are far within fp32


class Tile:
    """The logits of some queries and some keys of a block.

    Attributes:
        rows: The queries.
        columns: The keys within the block.
        keys: ``[w, P]`` or ``[w, M, P]``.
    """

    def __init__(self, block: KeyBlock, rows: slice, columns: slice, keys: Tensor) -> None:
        """``keys`` are those of ``columns``."""
        self.rows, self.columns, self._block, self.keys = rows, columns, block, keys

    def logits(self, scaled: Tensor) -> Tensor:
        """``[h, w]`` of all queries times scale."""
        return similarity(scaled[self.rows], self.keys)

    def positive(self, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        """Bool: the key is valid and has the query's number.

        Args:
            of_queries: Numbers of all queries, ``[B]``.
            of_keys: Those of the block's keys, ``[n]``.
        """
        same = of_queries[self.rows, None] == of_keys[self.columns]
        return same if self._block.valid is None else same & self._block.valid[self.columns]

    def weighted(self, logits: Tensor, positive: Tensor | None) -> Tensor:
        """Logits of the normaliser; may be the given ones. ``positive`` may be None where all weights are 1."""
        if (weights := self._block.log_weights) is not None:
            assert positive is not None
            if isinstance(weights, Tensor):
                added: Tensor | float = (weights[self.columns] * LOG2E).clamp_(min=LOWEST)
            else:
                added = max(weights * LOG2E, LOWEST)
            logits = torch.where(positive, logits, logits + added)
        return self.allowed(logits)

    def allowed(self, logits: Tensor) -> Tensor:
        """``LOWEST`` where the key is not valid; may be the given ones."""
        if self._block.left_out is None:
            return logits
        return logits.masked_fill(self._block.left_out[self.columns], LOWEST)


def strips(query: Tensor, block: KeyBlock) -> Iterator[tuple[slice, list[Tile]]]:
    """The tiles of the queries with a block by columns. A tile fits a CPU's cache, or is large for an accelerator."""
    several = (query.shape[1] if query.dim() == 3 else 1) * (block.keys.shape[1] if block.keys.dim() == 3 else 1)
    height = min(len(query), _TILE_ROWS) if query.device.type == "cpu" else len(query)
    width = max(1, tile_elements(query) // (height * several))
    for left in range(0, len(block.keys), width):
        columns = slice(left, min(left + width, len(block.keys)))
        rows = (slice(top, min(top + height, len(query))) for top in range(0, len(query), height))
        keys = block.keys[columns]
        yield columns, [Tile(block, one, columns, keys) for one in rows]


def tile_elements(query: Tensor) -> int:
    """The most elements of a tile."""
    return _TILE_ELEMENTS.get(query.device.type, _USUAL_TILE_ELEMENTS)


def host_sees(tensor: Tensor) -> bool:
    """Whether the host can look at values without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def is_plain(*bits: Tensor) -> bool:
    """Whether powers of 2 of all these fit fp32 as they are; false where the host would have to wait."""
    return all(host_sees(one) and _plain(one) for one in bits)


def _plain(bits: Tensor) -> bool:
    low, high = torch.aminmax(bits)
    return float(low) >= -_PLAIN_BITS and float(high) <= _PLAIN_BITS


def pair_products(query: Tensor, keys: Tensor) -> Tensor:
    """The similarity of query i and key i, ``[B]``."""
    if query.dim() == keys.dim() == 2:
        return (query * keys).sum(-1)
    several = [one if one.dim() == 3 else one[:, None] for one in (query, keys)]
    return (several[0] @ several[1].transpose(1, 2)).amax((1, 2))


class TileGradients:
    """The gradients of the queries and of a block's keys by those of the products of tiles."""

    def __init__(self, query: Tensor) -> None:
        """``query`` is what products were made of."""
        self._query = query
        self._of_query: Tensor | None = None

    def of_block(self, block: KeyBlock, of_tile: Callable[[Tile], Tensor], *, of_keys: bool) -> Tensor | None:
        """Adds to ``total``; the gradient of the block's keys, of their shape, or None where they get none.

        Args:
            block: The keys.
            of_tile: Gives the gradient of a tile's products.
            of_keys: Whether the keys get gradients.
        """
        made: Tensor | None = None
        for columns, tiles in strips(self._query, block):
            total: Tensor | None = None
            for tile in tiles:
                of_products, query, keys = self._flat(of_tile(tile), tile)
                self._add(tile.rows, of_products, keys)
                if of_keys:
                    # On a CPU transposed, by the product that needs no transposed copy of the tile.
                    factors = (query.t(), of_products) if host_sees(query) else (of_products.t(), query)
                    total = factors[0] @ factors[1] if total is None else total.addmm_(*factors)
            if total is None:
                continue
            found = (total.t() if host_sees(total) else total).view(block.keys[columns].shape)
            if len(found) == len(block.keys):
                return found.contiguous()
            made = torch.empty_like(block.keys) if made is None else made
            made[columns] = found
        return made

    def total(self) -> Tensor:
        """The gradient of the queries, of their shape, over all blocks so far; at least one."""
        assert self._of_query is not None
        return self._of_query

    def _flat(self, of_products: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the products of single embeddings, and these: of the queries and of the keys."""
        query, keys = self._query[tile.rows], tile.keys
        if query.dim() == keys.dim() == 2:
            return of_products, query, keys
        own, other = (one if one.dim() == 3 else one[:, None] for one in (query, keys))
        products = (own.flatten(0, 1) @ other.flatten(0, 1).t()).view(*own.shape[:2], *other.shape[:2])
        largest = products == products.amax((1, 3), keepdim=True)
        shares = of_products[:, None, :, None] * largest / largest.sum((1, 3), keepdim=True)
        return shares.flatten(2).flatten(0, 1), own.flatten(0, 1), other.flatten(0, 1)

    def _add(self, rows: slice, of_products: Tensor, keys: Tensor) -> None:
        if self._of_query is None and rows.stop - rows.start == len(self._query):
            self._of_query = (of_products @ keys).view(self._query.shape)
            return
        if self._of_query is None:
            self._of_query = torch.zeros_like(self._query)
        self._of_query[rows].view(-1, keys.shape[-1]).addmm_(of_products, keys)
