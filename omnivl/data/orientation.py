"""Turns pictures and clips upright: cameras store them as the sensor lay, and say beside them how they are to be shown.

Pictures say it in EXIF, clips in a display matrix.

Shapes: T frames, H x W pixels.
"""

import io
import struct
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from omnivl.data.formats import leading_metadata, picture_format

Value = TypeVar("Value", np.uint8, np.uint16, np.bool_)

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


_MARKS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation")
_READERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
}
"""Not by ``Image.open``, which refuses large pictures."""
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a picture whose header or EXIF it cannot read."""


def picture_orientation(media: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG or WebP, 1 to 8; 1 where it says none or its EXIF cannot be read."""
    reader = _READERS.get(picture_format(media) or "")
    if reader is None:
        return 1
    searched = leading_metadata(media)
    if not any(mark in searched for mark in _MARKS):
        return 1
    try:
        picture = reader(io.BytesIO(media))
    except _DAMAGED:  # a picture whose EXIF is damaged is shown as it is stored
        return 1
    with picture:
        return tagged_orientation(picture)


def tagged_orientation(picture: Image.Image) -> int:
    """The EXIF orientation of a picture that Pillow has opened, 1 to 8."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def matrix_orientation(matrix: Sequence[int]) -> int:
    """The orientation that comes nearest to a clip's display matrix, 1 to 8.

    Args:
        matrix: Nine numbers ``a b u c d v x y w``: a stored point (p, q) is shown at (ap + cq + x, bp + dq + y).

    Source: ISO/IEC 14496-12, the matrix of a track's header.
    """
    a, b, _, c, d = matrix[:5]
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    turn = (swap, (c if swap else a) < 0, (b if swap else d) < 0)
    return next((value for value, one in _TURNS.items() if one == turn), 1)


def upright(pixels: NDArray[Value], orientation: int) -> NDArray[Value]:
    """``[T, H, W, 3]`` as they are to be shown; ``[T, W, H, 3]`` for orientations 5 to 8."""
    if orientation == 1:
        return pixels
    swap, columns, rows = _TURNS[orientation]
    turned = pixels.transpose(0, 2, 1, 3) if swap else pixels
    turned = turned[:, :, ::-1] if columns else turned
    return np.ascontiguousarray(turned[:, ::-1] if rows else turned)


def upright_size(size: tuple[int, int], media: bytes) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from the size in which it is stored."""
    return turned_size(size, picture_orientation(media))


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) as shown, from those that are stored."""
    return size[::-1] if orientation >= 5 else size
