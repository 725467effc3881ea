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


def generator(*key: int | str) -> np.random.Generator:
    """Returns a NumPy generator that is a pure function of ``key``.

    Args:
        key: Integers and strings, e.g. ``(seed, "mlm", position)``. The order matters; ``1`` and ``"1"`` differ.
    """
    words = _Words(np.frombuffer(_digest(key), dtype="<u8"))
    return np.random.Generator(np.random.Philox(words))  # type: ignore[arg-type]  # NumPy documents any ISeedSequence


class Streams:
    """One generator that moves from place to place: a fifth of the cost of a generator for each sample."""

    def __init__(self, *key: int | str) -> None:
        """Makes the streams of a key.

        Args:
            key: What the numbers are a function of besides the place, as for ``generator``.
        """
        self._random = generator(*key)
        self._state = self._random.bit_generator.state
        self._counter = self._state["state"]["counter"]

    def at(self, place: int) -> np.random.Generator:
        """The generator at the beginning of a place's numbers, which never run into those of another one.

        It is the same object every time: be done with one place before the next.

        Args:
            place: From 0, e.g. the position of a sample.
        """
        self._counter[1] = place  # the second word of Philox's counter: 2^64 blocks of four numbers lie in between
        self._random.bit_generator.state = self._state
        return self._random


def uniforms(places: Sequence[int], count: int, *key: int | str) -> NDArray[np.float64]:
    """Numbers in [0, 1) for many samples: ``[len(places), count]``, a pure function of key and place.

    More numbers of a sample begin with the same ones.

    Args:
        places: One for each sample, from 0; any order.
        count: Numbers per sample.
        key: What the numbers are a function of besides the place, as for ``generator``.
    """
    streams = Streams(*key)
    numbers = np.empty((len(places), count))
    for row, place in zip(numbers, places, strict=True):
        streams.at(place).random(out=row)
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
