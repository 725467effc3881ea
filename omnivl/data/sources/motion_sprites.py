"""Sprites: embedded drawings on a plain background, drawn at a pose.

Shapes: H x W pixels of a sprite, S side of a frame.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.sources.base import BadSampleError, Sample

Pixels = NDArray[np.uint8]

BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (255, 255, 255),
    (225, 225, 225),
    (128, 128, 128),
    (40, 40, 48),
    (178, 212, 240),
    (190, 226, 190),
    (250, 236, 190),
    (244, 200, 208),
    (206, 192, 238),
    (60, 90, 110),
)
SMALLEST, LARGEST = 0.35, 0.75  # side of the sprite over side of the frame
CENTRE = (0.15, 0.85)  # where the sprite's centre may be
MIN_ASYMMETRY = 30.0  # grey levels; below, a rotation is not visible (plain circles have about 20)
MIN_CONTRAST = 40.0  # grey levels; below, the sprite is not visible
_PROBE_DEGREES = (40.0, 90.0)
_PROBE_SIZE = 32


@dataclass(frozen=True)
class Sprite:
    """A cut-out drawing.

    Attributes:
        colours: uint8 ``[H, W, 3]``, RGB, multiplied by alpha.
        alpha: uint8 ``[H, W, 1]``.
        asymmetry: Mean difference to itself turned, in grey levels; the smallest over some angles.
    """

    colours: Pixels
    alpha: Pixels
    asymmetry: float

    def on(self, background: tuple[int, int, int]) -> Pixels:
        """uint8 ``[H, W, 3]``: the sprite on a plain background."""
        rest = (255 - self.alpha).astype(np.uint16) * np.asarray(background, dtype=np.uint16)
        return self.colours + ((rest + 127) // 255).astype(np.uint8)

    def contrast(self, background: tuple[int, int, int]) -> float:
        """Mean difference to a background where the sprite is, in grey levels."""
        difference = np.abs(self.on(background).astype(np.int16) - np.asarray(background, dtype=np.int16)).max(axis=2)
        return float(difference.sum() / max(1.0, self.alpha.sum() / 255.0))


def read_sprite(sample: Sample) -> Sprite:
    """Decodes a drawing with its transparency; one without is a full rectangle.

    Raises:
        BadSampleError: ``broken_image``.
    """
    assert sample.media is not None, "drawings are stored encoded"
    decoded = cv2.imdecode(np.frombuffer(sample.media, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.ndim != 3:
        raise BadSampleError("broken_image", sample.where, "the drawing cannot be decoded to colours")
    if decoded.shape[2] == 4:
        alpha = np.ascontiguousarray(decoded[:, :, 3:])
    else:
        alpha = np.full((*decoded.shape[:2], 1), 255, dtype=np.uint8)
    product = decoded[:, :, 2::-1].astype(np.uint16) * alpha
    colours = (product // 255).astype(np.uint8)  # rounded down, so that colour plus background never exceeds 255
    return Sprite(colours, alpha, _asymmetry(colours, alpha))


def draw_frame(picture: Pixels, background: tuple[int, int, int], pose: NDArray[np.float64], size: int) -> Pixels:
    """Draws a sprite at a pose.

    Args:
        picture: ``[H, W, 3]``, on ``background`` already.
        background: Colour around it.
        pose: float64 ``[4]``: ``x``, ``y``, ``turn``, ``zoom`` in [0, 1).
        size: S.

    Returns:
        uint8 ``[S, S, 3]``.
    """
    x, y, turn, zoom = (float(value) for value in pose)
    side = SMALLEST * (LARGEST / SMALLEST) ** zoom * size
    scale = side / picture.shape[0]
    centre = (picture.shape[1] / 2 - 0.5, picture.shape[0] / 2 - 0.5)
    matrix = cv2.getRotationMatrix2D(centre, -360.0 * turn, scale)  # OpenCV turns counterclockwise
    low, high = CENTRE
    matrix[0, 2] += (low + (high - low) * x) * size - 0.5 - centre[0]
    matrix[1, 2] += (low + (high - low) * y) * size - 0.5 - centre[1]
    frame: Pixels = cv2.warpAffine(
        picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=background
    )
    return frame


def shrink(picture: Pixels, size: int) -> Pixels:
    """Halves a sprite until it is less than twice its largest drawn side: less to warp, and no aliasing."""
    while picture.shape[0] >= 2 * LARGEST * size:
        half = (picture.shape[1] // 2, picture.shape[0] // 2)
        picture = cv2.resize(picture, half, interpolation=cv2.INTER_AREA)
    return picture


def _asymmetry(colours: Pixels, alpha: Pixels) -> float:
    picture = np.concatenate([colours, alpha], axis=2)
    small = cv2.resize(picture, (_PROBE_SIZE, _PROBE_SIZE), interpolation=cv2.INTER_AREA)
    middle = (_PROBE_SIZE / 2 - 0.5, _PROBE_SIZE / 2 - 0.5)
    covered = max(1.0, float(small[:, :, 3].sum()) / 255.0)
    differences = []
    for degrees in _PROBE_DEGREES:
        matrix = cv2.getRotationMatrix2D(middle, degrees, 1.0)
        turned = cv2.warpAffine(small, matrix, (_PROBE_SIZE, _PROBE_SIZE), flags=cv2.INTER_LINEAR)
        difference = cv2.absdiff(small, turned).max(axis=2)
        differences.append(float(difference.sum()) / covered)
    return min(differences)
