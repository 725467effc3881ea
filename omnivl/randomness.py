"""Random numbers as pure functions of where they are used.

A generator is keyed by integers and strings (seed, stage, position of the sample, purpose), never by the order in which
code happens to run. A batch split over two ranks therefore sees the same masks, crops and negatives as the joined batch
in one process, and a resumed run needs no generator state.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray

_STRIDE = 2**32
"""Blocks of four numbers between the beginnings of two samples."""


def generator(*key: int | str) -> np.random.Generator:
    """Returns a NumPy generator that is a pure function of ``key``.

    Args:
        key: Integers and strings, e.g. ``(seed, "mlm", position)``. The order matters; ``1`` and ``"1"`` differ.
    """
    words = _Words(np.frombuffer(_digest(key), dtype="<u8"))
    return np.random.Generator(np.random.Philox(words))  # type: ignore[arg-type]  # NumPy documents any ISeedSequence


def uniforms(positions: Sequence[int], count: int, *key: int | str) -> NDArray[np.float64]:
    """Numbers in [0, 1) for many samples at once: ``[len(positions), count]``, a pure function of key and position.

    One generator jumps from sample to sample, which takes a quarter of the time of a generator for each. More numbers
    of a sample begin with the same ones.

    Args:
        positions: Places of the samples, from 0; any order.
        count: Numbers per sample.
        key: What the numbers are a function of besides the position, as for ``generator``.
    """
    random = generator(*key)
    philox = random.bit_generator
    assert isinstance(philox, np.random.Philox) and count <= 4 * _STRIDE
    numbers = np.empty((len(positions), count))
    place = 0
    for row, position in zip(numbers, positions, strict=True):
        philox.advance((position * _STRIDE - place) % 2**256)  # also drops what is left of a block of four
        random.random(out=row)
        place = position * _STRIDE + (count + 3) // 4
    return numbers


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
