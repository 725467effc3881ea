"""Which patches, frames and clips of a sample are masked. NumPy only: this runs in data workers.

Shapes: T temporal positions (frames, or tubelets where a 3D patch spans several frames), N patches of a frame.
"""

import math

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

_BLOCK_ATTEMPTS = 10
_MIN_ASPECT = 0.3


def block_mask(random: np.random.Generator, grid: tuple[int, int], probability: float, min_block: int = 4) -> Mask:
    """Masks rectangles until ``round(probability * N)`` patches are covered.

    A rectangle that would cover too many patches is thrown away; where several in a row do not fit, single patches
    beside what is masked already fill the rest, so that the number is exact.

    Args:
        random: The sample's generator.
        grid: Patches per side, (rows, columns).
        probability: Share of patches to mask. At least one patch is masked and at least one is left.
        min_block: Smallest area of a rectangle in patches.

    Returns:
        Bool ``[rows, columns]``, true where masked.

    Source: Bao et al., BEiT, arXiv 2106.08254, algorithm 1 (aspect ratio from 0.3 to 1 / 0.3, drawn log-uniformly).
    Differs: the number of masked patches is exact, where BEiT's is an upper bound.
    """
    rows, columns = grid
    count = bounded_count(probability, rows * columns)
    mask = np.zeros(grid, dtype=np.bool_)
    failures = 0
    while failures < _BLOCK_ATTEMPTS and (left := count - int(mask.sum())) > 0:
        area = random.uniform(min(min_block, left), left)
        aspect = math.exp(random.uniform(math.log(_MIN_ASPECT), -math.log(_MIN_ASPECT)))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, start = int(random.integers(rows - height + 1)), int(random.integers(columns - width + 1))
        block = mask[top : top + height, start : start + width]
        added = block.size - int(block.sum())
        if 0 < added <= left:
            block[:] = True
        else:
            failures += 1
    _fill(random, mask, count)
    return mask


def _fill(random: np.random.Generator, mask: Mask, count: int) -> None:
    """Masks single patches in place, neighbours of masked ones first, until ``count`` are masked."""
    while mask.sum() < count:
        beside = np.zeros_like(mask)
        beside[1:] |= mask[:-1]
        beside[:-1] |= mask[1:]
        beside[:, 1:] |= mask[:, :-1]
        beside[:, :-1] |= mask[:, 1:]
        candidates = np.flatnonzero(beside & ~mask)
        if candidates.size == 0:
            candidates = np.flatnonzero(~mask)
        mask.flat[random.choice(candidates)] = True


def frame_mask(random: np.random.Generator, times: int, probability: float) -> Mask:
    """Masks each temporal position by itself; at least one is masked and at least one is left.

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

    The first cut is drawn, so that the clip at either end may be shorter. At least one clip is masked and at least one
    is left.

    Args:
        random: The sample's generator.
        times: T, at least 2.
        probability: Probability of each clip.
        clip_length: Temporal positions per clip; where T is less than two clips, half of T.

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


def bounded_count(probability: float, size: int) -> int:
    """``round(probability * size)``, at least 1 and at most ``size - 1`` (1 where ``size`` is 1)."""
    return max(1, min(size - 1, round(probability * size)))


def _some_but_not_all(random: np.random.Generator, mask: Mask) -> Mask:
    """Flips one drawn element where all are equal."""
    assert mask.size >= 2, "one position cannot be both masked and left"
    if mask.all() or not mask.any():
        mask = mask.copy()
        chosen = random.integers(mask.size)
        mask[chosen] = not mask[chosen]
    return mask
