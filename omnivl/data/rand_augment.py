"""A RandAugment-style set of operations on clips: shape, tone and holes, one draw for all frames.

Shapes: T frames, H x W pixels; uint8, RGB. Strengths run from 0 to 1; operations with a direction draw a sign.

Source: Cubuk et al., "RandAugment" (arXiv 1909.13719), figure 2.
Differs: borders are continued instead of filled with black; cutout is one of the operations; colour changes live in
``augment``; the table of one clip is used for all its frames.
"""

import math
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.placement import Matrix, Step, pixel_map

Pixels = NDArray[np.uint8]
Operation = Callable[[Pixels, float, np.random.Generator], Pixels]
Linear = tuple[float, float, float, float]
Warped = tuple[Linear, tuple[float, float]]
Warp = Callable[[float, np.random.Generator, tuple[int, int]], Warped]
"""From strength, generator and (width, height) to a 2 x 2 matrix, row by row, about the centre, and a shift."""


def apply_random_operations(
    pixels: Pixels, count: int, magnitude: float, random: np.random.Generator
) -> tuple[Pixels, tuple[Step, ...]]:
    """Applies ``count`` operations drawn from ``WARPS`` and ``OPERATIONS``, with replacement.

    Args:
        pixels: ``[T, H, W, 3]``.
        count: Number of operations.
        magnitude: Strength from 0 to 1.
        random: The sample's generator.

    Returns:
        ``[T, H, W, 3]``, and the maps of points, as fractions of width and height.
    """
    moved: list[Step] = []
    for choice in random.integers(len(OPERATION_NAMES), size=count).tolist():
        pixels, further = apply_operation(OPERATION_NAMES[choice], pixels, magnitude, random)
        moved += further
    return pixels, tuple(moved)


def apply_operation(
    name: str, pixels: Pixels, strength: float, random: np.random.Generator
) -> tuple[Pixels, tuple[Step, ...]]:
    """One operation; see ``apply_random_operations``."""
    if name in OPERATIONS:
        return OPERATIONS[name](pixels, strength, random), ()
    size = pixels.shape[2], pixels.shape[1]
    linear, shift = _about_centre(*WARPS[name](strength, random, size), size)
    return _warp(pixels, linear, shift), (partial(pixel_map, linear, shift, size, size),)


def _signed(strength: float, random: np.random.Generator) -> float:
    return strength if random.random() < 0.5 else -strength


def _about_centre(linear: Linear, shift: tuple[float, float], size: tuple[int, int]) -> tuple[Matrix, Matrix]:
    """A map of pixel numbers, ``[2, 2]`` and ``[2]``, that turns about the centre and then shifts."""
    x, y = (size[0] - 1) / 2, (size[1] - 1) / 2
    a, b, c, d = linear
    return np.array([[a, b], [c, d]]), np.array([x - a * x - b * y + shift[0], y - c * x - d * y + shift[1]])


def _warp(pixels: Pixels, linear: Matrix, shift: Matrix) -> Pixels:
    """Maps every frame by a map of pixel numbers."""
    height, width = pixels.shape[1:3]
    matrix = np.column_stack([linear, shift])
    result = np.empty_like(pixels)
    for frame, target in zip(pixels, result, strict=True):
        cv2.warpAffine(frame, matrix, (width, height), dst=target, borderMode=cv2.BORDER_REPLICATE)
    return result


def _rotate(strength: float, random: np.random.Generator, size: tuple[int, int]) -> Warped:
    angle = math.radians(_signed(30 * strength, random))
    return (math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)), (0, 0)


def _shear_x(strength: float, random: np.random.Generator, size: tuple[int, int]) -> Warped:
    return (1, _signed(0.3 * strength, random), 0, 1), (0, 0)


def _shear_y(strength: float, random: np.random.Generator, size: tuple[int, int]) -> Warped:
    return (1, 0, _signed(0.3 * strength, random), 1), (0, 0)


def _translate_x(strength: float, random: np.random.Generator, size: tuple[int, int]) -> Warped:
    return (1, 0, 0, 1), (_signed(0.3 * strength, random) * size[0], 0)


def _translate_y(strength: float, random: np.random.Generator, size: tuple[int, int]) -> Warped:
    return (1, 0, 0, 1), (0, _signed(0.3 * strength, random) * size[1])


def _look_up(pixels: Pixels, table: NDArray[np.uint8]) -> Pixels:
    """Maps all values by a table ``[256]`` or, per channel, ``[256, 3]``."""
    stacked = pixels.reshape(-1, pixels.shape[2], 3)
    channels = table.reshape(1, 256, -1)
    return cv2.LUT(stacked, channels).reshape(pixels.shape)  # type: ignore[no-any-return]


def _posterize(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    dropped_bits = round(4 * strength)
    return _look_up(pixels, (np.arange(256) >> dropped_bits << dropped_bits).astype(np.uint8))


def _solarize(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    values = np.arange(256)
    threshold = 256 * (1 - strength / 2)  # at full strength the upper half is inverted
    return _look_up(pixels, np.where(values >= threshold, 255 - values, values).astype(np.uint8))


def _auto_contrast(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    low = pixels.min(axis=(0, 1, 2)).astype(np.float64)
    high = np.maximum(pixels.max(axis=(0, 1, 2)), low + 1)
    stretched = (np.arange(256)[:, None] - low) * (255 / (high - low))
    return _look_up(pixels, np.clip(stretched, 0, 255).astype(np.uint8))


def _equalize(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    table = np.empty((256, 3), dtype=np.uint8)
    for channel in range(3):
        reached = np.cumsum(np.bincount(pixels[..., channel].ravel(), minlength=256))
        first = reached[np.flatnonzero(reached)[0]]
        table[:, channel] = np.clip((reached - first) * 255 // max(1, reached[-1] - first), 0, 255)
    return _look_up(pixels, table)


def _sharpness(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    """Sharpens or blurs by adding or taking away the difference from a 3 x 3 average."""
    amount = _signed(0.9 * strength, random)
    result = np.empty_like(pixels)
    for frame, target in zip(pixels, result, strict=True):
        cv2.addWeighted(frame, 1 + amount, cv2.blur(frame, (3, 3)), -amount, 0, dst=target)
    return result


def _cutout(pixels: Pixels, strength: float, random: np.random.Generator) -> Pixels:
    height, width = pixels.shape[1:3]
    side = round(0.4 * strength * min(height, width))
    y, x = int(random.random() * (height - side + 1)), int(random.random() * (width - side + 1))
    result = pixels.copy()
    result[:, y : y + side, x : x + side] = 128
    return result


WARPS: dict[str, Warp] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
OPERATIONS: dict[str, Operation] = {
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "sharpness": _sharpness,
    "cutout": _cutout,
}
OPERATION_NAMES = (*WARPS, *OPERATIONS)
