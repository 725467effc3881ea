"""The order of samples: a full shuffle of every epoch as a pure function, without a buffer and without state.

Position p of an entry's endless sequence is sample ``permutation(p mod N)`` of epoch ``p // N``. The permutation is a
Feistel network over the smallest even number of bits that holds N, applied repeatedly until the value is below N. It
needs no memory for any N, and any position can be computed directly.

Source: cycle walking, Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 4.
"""

import numpy as np
from numpy.typing import NDArray

from omnivl.randomness import generator

_ROUNDS = 6
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1024
"""Number of positions that are computed together: as arrays they take a twentieth of the time."""


class Order:
    """Endless shuffled order over ``length`` samples."""

    def __init__(self, length: int, *key: int | str) -> None:
        """Describes an order.

        Args:
            length: Samples per epoch, at least 1.
            key: The shuffle is a function of it, e.g. seed and name of the entry.
        """
        assert length > 0, "an order needs samples"
        self.length = length
        self._key = key
        self._half = max(1, ((length - 1).bit_length() + 1) // 2)
        self._kept: tuple[tuple[int, int], list[int]] = (-1, -1), []

    def __call__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, index of the sample) of a position."""
        epoch, place = divmod(position, self.length)
        block, row = divmod(place, _BLOCK)
        kept, indices = self._kept
        if kept != (epoch, block):
            indices = self._shuffle(epoch, block * _BLOCK).tolist()
            self._kept = (epoch, block), indices
        return epoch, indices[row]

    def _shuffle(self, epoch: int, first: int) -> NDArray[np.uint64]:
        """The samples at the places of one block."""
        keys = generator(*self._key, "order", epoch).integers(0, 2**63, size=_ROUNDS).astype(np.uint64)
        values = self._mix(np.arange(first, min(first + _BLOCK, self.length), dtype=np.uint64), keys)
        while (outside := np.flatnonzero(values >= self.length)).size:  # the domain is at most 4 times as large
            values[outside] = self._mix(values[outside], keys)
        return values

    def _mix(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in keys:
            hashed = (right ^ key) * _MULTIPLIER
            hashed = (hashed ^ (hashed >> np.uint64(32))) * _MULTIPLIER
            left, right = right, left ^ ((hashed >> np.uint64(40)) & mask)
        return (left << half) | right
