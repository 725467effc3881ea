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
            columns = weights[self.columns] if isinstance(weights, Tensor) else weights
            logits = torch.where(positive, logits, logits + columns * LOG2E)
        return self.allowed(logits)

    def allowed(self, logits: Tensor) -> Tensor:
        """Minus infinity where the key is not valid; may be the given ones."""
        if self._block.valid is None:
            return logits
        return logits.masked_fill(~self._block.valid[self.columns], float("-inf"))


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

    def __init__(self, query: Tensor, of_query: Tensor, *, of_keys: bool) -> None:
        """Adds to ``of_query``, of the shape of ``query``; keys get gradients too where ``of_keys``."""
        self._query, self._of_query, self._for_keys = query, of_query, of_keys

    def of_block(self, block: KeyBlock, of_tile: Callable[[Tile], Tensor]) -> Tensor:
        """The gradient of the block's keys, of their shape; empty where they get none.

        Args:
            block: The keys.
            of_tile: Gives the gradient of a tile's products.
        """
        made = torch.empty_like(block.keys) if self._for_keys else block.keys.new_empty(0)
        for columns, tiles in strips(self._query, block):
            # Its transpose is the one whose product needs no transposed copy of the tile.
            shape = block.keys[columns].shape
            transposed = made.new_zeros(shape[-1], shape[:-1].numel()) if self._for_keys else None
            for tile in tiles:
                self._add(of_tile(tile), tile, transposed)
            if transposed is not None:
                made[columns] = transposed.t().view(shape)
        return made

    def _add(self, of_products: Tensor, tile: Tile, of_keys: Tensor | None) -> None:
        query, keys, of_query = self._query[tile.rows], tile.keys, self._of_query[tile.rows]
        if query.dim() == 3 or keys.dim() == 3:
            own, other = (one if one.dim() == 3 else one[:, None] for one in (query, keys))
            products = (own.flatten(0, 1) @ other.flatten(0, 1).t()).view(*own.shape[:2], *other.shape[:2])
            largest = products == products.amax((1, 3), keepdim=True)
            shares = of_products[:, None, :, None] * largest / largest.sum((1, 3), keepdim=True)
            of_products, query, keys = shares.flatten(2).flatten(0, 1), own.flatten(0, 1), other.flatten(0, 1)
            of_query = of_query.view(-1, of_query.shape[-1])
        of_query.addmm_(of_products, keys)
        if of_keys is not None:
            of_keys.addmm_(query.t(), of_products)
