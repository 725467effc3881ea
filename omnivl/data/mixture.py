"""Which entry micro-batch k comes from: a pure function of (seed, k, weights), equal on every replica.

Draws are stratified in blocks: of the ``BLOCK`` micro-batches of a block each entry gets its share to within one, in
random order. A rare entry is therefore never missing by chance, and the number of an entry's batches before k is a sum
over blocks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError
from omnivl.randomness import generator

BLOCK = 256


class Mixture:
    """The sequence of entries."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Describes a mixture.

        Args:
            weights: One per entry, not negative, not all zero.
            seed: The stage's seed.

        Raises:
            DataError: The weights are no weights.
        """
        if not weights or min(weights) < 0 or not np.isfinite(weights).all() or sum(weights) <= 0:
            raise DataError(f"data weights are {list(weights)}; allowed: numbers of at least 0, one of them above 0")
        self._bounds = np.cumsum(np.asarray(weights, dtype=np.float64)) / sum(weights)
        self._last = int(np.flatnonzero(np.asarray(weights) > 0)[-1])
        self._seed = seed
        self._blocks: dict[int, NDArray[np.int64]] = {}
        self._totals: list[NDArray[np.int64]] = [np.zeros(len(weights), dtype=np.int64)]

    def entry(self, micro_step: int) -> int:
        """Index of the entry that micro-batch ``micro_step`` comes from."""
        block, place = divmod(micro_step, BLOCK)
        return int(self._block(block)[place])

    def counts(self, micro_step: int) -> tuple[int, ...]:
        """How many of the micro-batches before ``micro_step`` came from each entry."""
        block, place = divmod(micro_step, BLOCK)
        while len(self._totals) <= block:
            self._totals.append(self._totals[-1] + self._count(self._block(len(self._totals) - 1)))
        return tuple(int(count) for count in self._totals[block] + self._count(self._block(block)[:place]))

    def _count(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(entries, minlength=len(self._bounds)).astype(np.int64)

    def _block(self, block: int) -> NDArray[np.int64]:
        if block not in self._blocks:
            random = generator(self._seed, "mixture", block)
            uniforms = (random.permutation(BLOCK) + random.random()) / BLOCK
            entries = np.searchsorted(self._bounds, uniforms, side="right")
            if len(self._blocks) >= 8:
                self._blocks.clear()
            self._blocks[block] = np.minimum(entries, self._last).astype(np.int64)
        return self._blocks[block]
