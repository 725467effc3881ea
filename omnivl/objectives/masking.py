"""Which patches, frames and clips of a sample are masked. NumPy only: this runs in data workers.

Shapes: T temporal positions (frames, or tubelets where a 3D patch spans several frames), N patches of a frame.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

_BLOCK_ATTEMPTS = 10
_LOG_ASPECT = math.log(0.3)
_DRAWN_AT_ONCE = 32


def block_mask(random: np.random.Generator, grid: tuple[int, int], probability: float, min_block: int = 4) -> Mask:
    """Masks rectangles until ``round(probability * N)`` patches are covered.

    A rectangle that would cover too many patches, or none that is not covered, is discarded. After ten such rectangles,
    single patches next to masked ones are masked instead, so that the number is exact.

    Args:
        random: The sample's generator.
        grid: Patches per side, (rows, columns).
        probability: Share of patches to mask. At least one patch is masked and at least one is left.
        min_block: Smallest area that is drawn for a rectangle, in patches; where fewer are left to mask, their number.

    Returns:
        Bool ``[rows, columns]``, true where masked.

    Source: Bao et al., BEiT, arXiv 2106.08254, algorithm 1 (aspect ratio from 0.3 to 1 / 0.3, drawn log-uniformly).
    Differs: the number of masked patches is exact; in BEiT it is an upper bound. Where fewer than ``min_block`` patches
        are left, the area is their number; in BEiT's code it is drawn between the two, so that its last rectangles lie
        over covered patches. Sides are rounded as there: a rectangle may be a little smaller than its area. A side that
        exceeds the grid is cut to it; BEiT discards the rectangle. BEiT allows ten for each rectangle that it places,
        ours ten in a picture.
    """
    rows, columns = grid
    size = rows * columns
    count = bounded_count(probability, size)
    draw = _stream(random).__next__
    mask = failures = 0  # the mask as bits of an integer, one per patch: much faster than arrays of this size
    while failures < _BLOCK_ATTEMPTS and (left := count - mask.bit_count()) > 0:
        least = min(min_block, left)
        area = least + draw() * (left - least)
        aspect = math.exp(_LOG_ASPECT * (1 - 2 * draw()))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, start = int(draw() * (rows - height + 1)), int(draw() * (columns - width + 1))
        block = _rectangle(height, width, columns) << (top * columns + start)
        added = height * width - (mask & block).bit_count()
        if 0 < added <= left:
            mask |= block
        else:
            failures += 1
    mask = _fill(draw, mask, count, grid)
    packed = np.frombuffer(mask.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_).reshape(grid)


def _stream(random: np.random.Generator) -> Iterator[float]:
    """Uniform numbers in [0, 1), drawn many at a time because each call into NumPy is slow."""
    return chain.from_iterable(random.random(_DRAWN_AT_ONCE).tolist() for _ in repeat(None))


@lru_cache(maxsize=4096)
def _rectangle(height: int, width: int, columns: int) -> int:
    """The bits of a rectangle in the upper left corner of a grid."""
    return sum(((1 << width) - 1) << (row * columns) for row in range(height))


def _fill(draw: Callable[[], float], mask: int, count: int, grid: tuple[int, int]) -> int:
    """Masks single patches, neighbours of masked ones first, until ``count`` are masked."""
    rows, columns = grid
    everything = (1 << (rows * columns)) - 1
    first_column = _rectangle(rows, 1, columns)
    last_column = first_column << (columns - 1)
    while mask.bit_count() < count:
        below_and_above = (mask << columns) | (mask >> columns)
        beside = below_and_above | ((mask & ~last_column) << 1) | ((mask & ~first_column) >> 1)
        candidates = (beside & ~mask & everything) or (everything & ~mask)
        for _ in range(int(draw() * candidates.bit_count())):
            candidates &= candidates - 1  # drops the lowest patch
        mask |= candidates & -candidates
    return mask


def frame_mask(random: np.random.Generator, times: int, probability: float) -> Mask:
    """Masks each temporal position independently; at least one is masked and at least one is left.

    Args:
        random: The sample's generator.
        times: T, at least 2.
        probability: Probability of each position.

    Returns:
        Bool ``[T]``, true where masked.
    """
    return _some_but_not_all(random, random.random(times) < probability)


def clip_mask(random: np.random.Generator, times: int, probability: float, clip_length: int) -> Mask:
    """Cuts time into clips of consecutive positions and masks whole clips.

    The first boundary is random, so that the first and the last clip may be shorter. At least one clip is masked and at
    least one is left.

    Args:
        random: The sample's generator.
        times: T, at least 2.
        probability: Probability of each clip.
        clip_length: Temporal positions per clip; if T is less than two clips, half of T.

    Returns:
        Bool ``[T]``, true where masked.
    """
    length = min(clip_length, times // 2)
    phase = int(random.integers(length))
    clip_of_time = (np.arange(times) + phase) // length
    masked = _some_but_not_all(random, random.random(int(clip_of_time[-1]) + 1) < probability)
    return masked[clip_of_time]


def over_patches(mask: Mask, grid: tuple[int, int]) -> Mask:
    """Repeats a mask over time ``[T]`` for every patch of a frame: bool ``[T, N]``."""
    return np.repeat(mask[:, None], grid[0] * grid[1], axis=1)


def in_places(mask: Mask, places: int) -> Mask:
    """A mask of the patches that a picture has, bool ``[T, n]``, as one of ``places`` positions; the last are false."""
    if mask.shape[1] == places:
        return mask
    found = np.zeros((len(mask), places), dtype=np.bool_)
    found[:, : mask.shape[1]] = mask
    return found


def bounded_count(probability: float, size: int) -> int:
    """``round(probability * size)``, at least 1 and at most ``size - 1`` (1 where ``size`` is 1)."""
    return max(1, min(size - 1, round(probability * size)))


def _some_but_not_all(random: np.random.Generator, mask: Mask) -> Mask:
    """Flips one random element if all are equal."""
    assert mask.size >= 2, "one position cannot be both masked and left"
    if mask.all() or not mask.any():
        mask = mask.copy()
        chosen = random.integers(mask.size)
        mask[chosen] = not mask[chosen]
    return mask
