"""Random numbers as pure functions of where they are used.

A generator is keyed by integers and strings (seed, stage, position of the sample, purpose), never by the order in which
code happens to run. A batch split over two ranks therefore sees the same masks, crops and negatives as the joined batch
in one process, and a resumed run needs no generator state.
"""

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """Returns a NumPy generator that is a pure function of ``key``.

    Args:
        key: Integers and strings, e.g. ``(seed, "mlm", position)``. The order matters; ``1`` and ``"1"`` differ.
    """
    return np.random.Generator(np.random.Philox(key=_key_bits(key)))


def stable_hash(*key: int | str) -> int:
    """Returns a non-negative 63-bit integer that is the same on every machine and in every process."""
    return _key_bits(key) & (2**63 - 1)


def _key_bits(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")
