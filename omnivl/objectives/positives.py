"""Which keys of a block are positives of which queries, by groups of equal numbers instead of a mask.

Shapes: B queries, n keys of a block, P projection size.
"""

import torch
from torch import Tensor

from omnivl.objectives.spread_keys import KeyBlock
from omnivl.objectives.tiles import host_sees


class Positives:
    """Sums over the positives of each query within a block, by way of sums over keys of equal numbers.

    This takes as many operations as there are keys, where a mask takes as many as the matrix has elements, and more
    of them: it pays where a block has many tiles.
    """

    def __init__(self, block: KeyBlock, of_queries: Tensor, of_keys: Tensor) -> None:
        """Groups the keys by numbers that positives share; queries and keys have one embedding each."""
        self._valid = block.valid
        ordered = of_keys.sort().values
        self._of_key = torch.searchsorted(ordered, of_keys)
        self._of_query = torch.searchsorted(ordered, of_queries).clamp_(max=len(ordered) - 1)
        self._found = ordered[self._of_query] == of_queries
        self.none = host_sees(of_keys) and not bool(self._found.any())
        """Whether there are none for certain."""

    def by_query(self, of_keys: Tensor) -> Tensor:
        """For each query the sum of ``of_keys [n, ...]`` over its positives, ``[B, ...]``."""
        sums = self._summed(self._of_key, _kept(of_keys, self._valid))
        return _kept(sums[self._of_query], self._found)

    def by_key(self, of_queries: Tensor) -> Tensor:
        """For each key the sum of ``of_queries [B, ...]`` over the queries whose positive it is, ``[n, ...]``."""
        sums = self._summed(self._of_query, _kept(of_queries, self._found))
        return _kept(sums[self._of_key], self._valid)

    def _summed(self, group: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(len(self._of_key), *values.shape[1:]).index_add_(0, group, values)


def _kept(rows: Tensor, which: Tensor | None) -> Tensor:
    return rows if which is None else rows * which.view(-1, *[1] * (rows.dim() - 1))
