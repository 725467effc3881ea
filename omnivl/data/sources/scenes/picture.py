"""Draws scenes, and finds the boxes and masks of their things.

Shapes: S side of the picture in pixels, N things.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.sources.motion_sprites import Sprite
from omnivl.data.sources.scenes.world import GRID, GROUNDS, Colour, Scene, Thing

Pixels = NDArray[np.uint8]

SCREEN: Colour = (50, 50, 50)
_SOLID = 127  # alpha above which a pixel belongs to a drawing


@dataclass(frozen=True)
class Picture:
    """A drawn scene.

    Attributes:
        pixels: uint8 ``[S, S, 3]``, RGB.
        masks: bool ``[N, S, S]``: what can be seen of each thing.
    """

    pixels: Pixels
    masks: NDArray[np.bool_]

    def box(self, number: int) -> list[float]:
        """The smallest upright box around what can be seen of a thing: left, top, right, bottom, from 0 to 1."""
        rows, columns = (self.masks[number].any(axis=axis).nonzero()[0] for axis in (1, 0))
        side = self.masks.shape[1]
        ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        return [round(float(end) / side, 6) for end in ends]


def draw(scene: Scene, sprite: Callable[[int], Sprite], size: int) -> Picture:
    """Draws a scene.

    Args:
        scene: The scene.
        sprite: The drawing of an index.
        size: S.
    """
    pixels = np.empty((size, size, 3), dtype=np.uint8)
    pixels[:] = GROUNDS[scene.ground]
    masks = np.zeros((len(scene.things), size, size), dtype=np.bool_)
    for number, thing in enumerate(scene.things):
        solid = stamp(pixels, sprite(thing.drawing), thing)
        masks[:number] &= ~solid
        masks[number] = solid
    if scene.screen is not None:
        ends = [round(place * size / GRID) for place in range(GRID + 1)]
        row, column = divmod(scene.screen, GRID)
        hidden = slice(ends[row], ends[row + 1]), slice(ends[column], ends[column + 1])
        pixels[hidden] = SCREEN
        masks[:, *hidden] = False
    return Picture(pixels, masks)


def stamp(pixels: Pixels, sprite: Sprite, thing: Thing) -> NDArray[np.bool_]:
    """Draws one thing over a picture, in place.

    Args:
        pixels: uint8 ``[S, S, 3]``.
        sprite: Its drawing.
        thing: Its place and side.

    Returns:
        bool ``[S, S]``, where it is.
    """
    size = pixels.shape[0]
    side = max(1, round(thing.side * size))
    colours = cv2.resize(sprite.colours, (side, side), interpolation=cv2.INTER_AREA)
    alpha = cv2.resize(sprite.alpha, (side, side), interpolation=cv2.INTER_AREA)
    left, top = round(thing.x * size - side / 2), round(thing.y * size - side / 2)
    rows, columns = _overlap(top, side, size), _overlap(left, side, size)
    there = slice(top + rows.start, top + rows.stop), slice(left + columns.start, left + columns.stop)
    shown = alpha[rows, columns, None].astype(np.uint16)
    behind = ((255 - shown) * pixels[there] + 127) // 255
    pixels[there] = np.minimum(colours[rows, columns] + behind, 255).astype(np.uint8)
    solid = np.zeros((size, size), dtype=np.bool_)
    solid[there] = shown[..., 0] > _SOLID
    return solid


def as_png(pixels: Pixels | NDArray[np.bool_]) -> bytes:
    """A picture ``[H, W, 3]``, RGB, or a mask ``[H, W]``, white inside, as a PNG."""
    stored = pixels[..., ::-1] if pixels.ndim == 3 else pixels.astype(np.uint8) * 255
    written, png = cv2.imencode(".png", np.ascontiguousarray(stored), (cv2.IMWRITE_PNG_COMPRESSION, 1))
    assert written
    return png.tobytes()


def _overlap(start: int, side: int, size: int) -> slice:
    """The pixels of a drawing that lie within the picture, which begins at 0."""
    return slice(max(0, -start), min(side, size - start))
