"""Turns pictures upright: cameras store them as the sensor lay, and say in EXIF how they are to be shown.

Shapes: T frames, H x W pixels.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

# transpose, then mirror columns, then mirror rows, for each value of the EXIF tag
_TURNS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def picture_orientation(media: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG or WebP, 1 to 8; 1 where it says none or its EXIF cannot be read."""
    if not any(mark in media for mark in (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation")):
        return 1
    try:
        with Image.open(io.BytesIO(media), formats=("JPEG", "PNG", "WEBP")) as picture:
            value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a picture whose EXIF is damaged is shown as it is stored
        return 1
    return value if value in _TURNS else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """``[T, H, W, 3]`` as they are to be shown; ``[T, W, H, 3]`` for orientations 5 to 8."""
    if orientation == 1:
        return pixels
    swap, columns, rows = _TURNS[orientation]
    turned = pixels.transpose(0, 2, 1, 3) if swap else pixels
    turned = turned[:, :, ::-1] if columns else turned
    return np.ascontiguousarray(turned[:, ::-1] if rows else turned)


def upright_size(size: tuple[int, int], media: bytes) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from the size in which it is stored."""
    return size[::-1] if picture_orientation(media) >= 5 else size
