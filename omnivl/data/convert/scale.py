"""Scales pictures down, so that the loader makes the same of the result as of the original.

What is kept: 16 bits per colour, grey, transparency, every frame of an animation with its duration. What is not: the
orientation in EXIF (the pixels are turned instead), a second picture inside the file, and all other metadata.

Shapes: H x W pixels; sizes are (width, height).
"""

import io
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omnivl.data.animated import count_frames, open_animated, painted_frames
from omnivl.data.convert.animation import write_webp
from omnivl.data.decode import stored_pixels
from omnivl.data.formats import is_animated, is_clip, may_move, picture_format
from omnivl.data.jpeg import decode_jpeg
from omnivl.data.limits import DecodeLimits
from omnivl.data.orientation import picture_orientation, turned_size, upright

_JPEG_QUALITY = 95
_DRAWN = ("P", "1")  # palettes: flat colours with hard edges, which JPEG blurs
_COLOURS_OF_PROFILE = {"RGB": b"RGB ", "L": b"GRAY", "RGBA": b"RGB "}

Stored = NDArray[np.uint8] | NDArray[np.uint16]


def smaller(width: int, height: int, shorter_side: int) -> tuple[int, int] | None:
    """The new size, or None if the picture is small enough."""
    shorter = min(width, height)
    if shorter <= shorter_side:
        return None
    return max(1, round(width * shorter_side / shorter)), max(1, round(height * shorter_side / shorter))


def scale_picture(
    data: bytes, extension: str, size: tuple[int, int], limits: DecodeLimits, where: str
) -> tuple[bytes, str]:
    """Scales a picture or an animation.

    Args:
        data: The file.
        extension: Its lower-case extension without dot.
        size: The new width and height, of the picture as it is stored.
        limits: Bounds of decoding.
        where: For messages.

    Returns:
        The bytes and their extension: animated WebP for an animation, else PNG for 16 bits, transparency
        and palettes, else JPEG.

    Raises:
        BadSampleError: It has too many frames.
    """
    orientation = picture_orientation(data)
    size = turned_size(size, orientation)
    if is_clip(extension, data):
        frames = _scaled_frames(data, size, orientation, limits, where)
        return write_webp(frames, _repeats(data)), "webp"
    stored = _upright(_stored(data, limits, where), orientation)
    if stored.dtype == np.uint16:
        return cv2.imencode(".png", _scaled_16_bits(stored, size))[1].tobytes(), "png"
    picture = Image.fromarray(_in_pillows_order(stored))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    mode, profile = _mode_and_profile(data)
    if profile is None or profile[16:20] != _COLOURS_OF_PROFILE[picture.mode]:
        profile = None  # that of CMYK fits no RGB
    if picture.mode == "RGBA" or mode in _DRAWN:
        picture.save(out, "PNG", icc_profile=profile)
        return out.getvalue(), "png"
    picture.save(out, "JPEG", quality=_JPEG_QUALITY, icc_profile=profile)
    return out.getvalue(), "jpg"


def _stored(data: bytes, limits: DecodeLimits, where: str) -> Stored:
    """A picture as it is stored: grey ``[H, W]``, BGR or BGRA."""
    if picture_format(data) == "jpeg":
        pixels = decode_jpeg(data, 1, limits, where)
        return pixels[:, :, 0] if _mode_and_profile(data)[0] == "L" else pixels[:, :, ::-1]
    if not may_move(data):
        return stored_pixels(data)
    with open_animated(data) as picture:
        rgba = np.asarray(picture.convert("RGBA"))
    return cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA if rgba[:, :, 3].min() < 255 else cv2.COLOR_RGBA2BGR)  # type: ignore[no-any-return]


def _upright(pixels: Stored, orientation: int) -> Stored:
    """``[H, W]`` or ``[H, W, C]`` to ``[H, W, C]``, turned."""
    shaped: NDArray[Any] = pixels.reshape(1, *pixels.shape[:2], -1)
    turned: Stored = upright(shaped, orientation)[0]
    return turned


def _in_pillows_order(pixels: Stored) -> Stored:
    """Grey ``[H, W, 1]``, BGR or BGRA to grey ``[H, W]``, RGB or RGBA."""
    if pixels.shape[2] == 1:
        return pixels[:, :, 0]
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)  # type: ignore[no-any-return]


def _scaled_16_bits(pixels: Stored, size: tuple[int, int]) -> Stored:
    """Scales grey, BGR or BGRA; transparent pixels do not colour their neighbours."""
    if pixels.shape[2] < 4:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)  # type: ignore[no-any-return]
    alpha = pixels[:, :, 3:].astype(np.float32)
    weighted = np.concatenate([pixels[:, :, :3] * (alpha / 65535), alpha], axis=2)
    scaled = cv2.resize(weighted, size, interpolation=cv2.INTER_AREA)
    scaled[:, :, :3] /= np.maximum(scaled[:, :, 3:], 1e-6) / 65535
    return np.rint(scaled).clip(0, 65535).astype(np.uint16)  # type: ignore[no-any-return]


def _mode_and_profile(data: bytes) -> tuple[str, bytes | None]:
    """Pillow's mode of a picture as it is stored, and its colour profile; ``""`` and None if only Pillow refuses it."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            profile = picture.info.get("icc_profile")
            return picture.mode, profile if isinstance(profile, bytes) else None
    except (OSError, SyntaxError, ValueError):
        return "", None


def _repeats(data: bytes) -> int:
    """How often an animation plays; 0 for without end."""
    with open_animated(data) as picture:
        return int(picture.info.get("loop", 0 if is_animated(data) else 1))


def _scaled_frames(
    data: bytes, size: tuple[int, int], orientation: int, limits: DecodeLimits, where: str
) -> Iterator[tuple[Image.Image, int]]:
    """The frames of an animation, upright, with their durations in milliseconds."""
    for picture in painted_frames(data, count_frames(data, limits, where), limits, where):
        rgba = np.asarray(picture.convert("RGBA"))  # decodes, and only then is the duration that of this frame
        frame = Image.fromarray(upright(rgba[None], orientation)[0])
        yield frame.resize(size, Image.Resampling.LANCZOS), int(picture.info.get("duration", 0))
