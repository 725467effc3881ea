"""The order of samples: a full shuffle of every epoch as a pure function, without a buffer and without state.

Position p of an entry's endless sequence is sample ``permutation(p mod N)`` of epoch ``p // N``. The permutation is a
Feistel network over the smallest even number of bits that holds N, walked until it lands below N, so that it costs no
memory for any N and any place can be asked for directly.

Source: cycle walking, Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 4.
"""

from functools import lru_cache

from omnivl.randomness import generator

_ROUNDS = 6
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Order:
    """Endless shuffled order over ``length`` samples."""

    def __init__(self, length: int, *key: int | str) -> None:
        """Describes an order.

        Args:
            length: Samples per epoch, at least 1.
            key: What the shuffle is a function of, e.g. seed and name of the entry.
        """
        assert length > 0, "an order needs samples"
        self.length = length
        self._key = key
        self._half = max(1, ((length - 1).bit_length() + 1) // 2)

    def __call__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, index of the sample) of a position."""
        epoch, place = divmod(position, self.length)
        keys = _round_keys(epoch, self._key)
        value = self._mix(place, keys)
        while value >= self.length:  # the domain is at most 4 times as large: 4 steps are expected at worst
            value = self._mix(value, keys)
        return epoch, value

    def _mix(self, value: int, keys: tuple[int, ...]) -> int:
        half, mask = self._half, (1 << self._half) - 1
        left, right = value >> half, value & mask
        for key in keys:
            hashed = ((right ^ key) * _MULTIPLIER) & _MASK
            hashed = ((hashed ^ (hashed >> 32)) * _MULTIPLIER) & _MASK
            left, right = right, left ^ ((hashed >> 40) & mask)
        return (left << half) | right


@lru_cache(maxsize=64)
def _round_keys(epoch: int, key: tuple[int | str, ...]) -> tuple[int, ...]:
    draws = generator(*key, "order", epoch).integers(0, 2**63, size=_ROUNDS)
    return tuple(int(draw) for draw in draws)
