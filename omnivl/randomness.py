"""Random numbers as pure functions of where they are used.

A generator is keyed by integers and strings (seed, stage, position of the sample, purpose), never by the order in which
code happens to run. A batch split over two ranks therefore sees the same masks, crops and negatives as the joined batch
in one process, and a resumed run needs no generator state.
"""

import hashlib

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray


def generator(*key: int | str) -> np.random.Generator:
    """Returns a NumPy generator that is a pure function of ``key``.

    Args:
        key: Integers and strings, e.g. ``(seed, "mlm", position)``. The order matters; ``1`` and ``"1"`` differ.
    """
    words = _Words(np.frombuffer(_digest(key), dtype="<u8"))
    return np.random.Generator(np.random.Philox(words))  # type: ignore[arg-type]  # NumPy documents any ISeedSequence


def stable_hash(*key: int | str) -> int:
    """Returns a non-negative 63-bit integer that is the same on every machine and in every process."""
    return _key_bits(key) & (2**63 - 1)


def _key_bits(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(_digest(key), "little")


def _digest(key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


class _Words(ISeedSequence):
    """Gives Philox its key. ``Philox(key=...)`` has the same streams but asks the system for entropy it never uses."""

    __slots__ = ("words",)

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[np.uint64]:
        assert n_words == len(self.words) and np.dtype(dtype) == np.uint64, "the key of a Philox generator"
        return self.words
