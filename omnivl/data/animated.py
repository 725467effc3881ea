"""Decodes pictures that move: GIF and animated WebP, whose frames are painted one over the other.

Shapes: T frames, H x W pixels.
"""

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omnivl.data.formats import frame_durations
from omnivl.data.frames import gather_frames
from omnivl.data.limits import DecodeLimits, check_wanted, check_work
from omnivl.data.orientation import picture_orientation, upright
from omnivl.data.sources.base import BadSampleError
from omnivl.data.transparency import on_white


def open_animated(media: bytes) -> Image.Image:
    """Opens a GIF or an animated WebP, whether it has several frames or one."""
    return Image.open(io.BytesIO(media), formats=("GIF", "WEBP"))


def count_frames(media: bytes, limits: DecodeLimits, where: str) -> int:
    """The number of frames that the decoder finds.

    Raises:
        BadSampleError: ``too_many_frames``.
    """
    limits.check_frames(len(frame_durations(media)), where)  # the decoder's own count takes longer
    with open_animated(media) as picture:
        total = int(getattr(picture, "n_frames", 1))
    limits.check_frames(total, where)
    return total


def painted_frames(media: bytes, count: int, limits: DecodeLimits, where: str) -> Iterator[Image.Image]:
    """The first frames, one after the other, as they are stored: each time the same picture, with its next frame.

    Args:
        media: The file.
        count: Number of frames.
        limits: Bounds.
        where: For messages.

    Raises:
        BadSampleError: ``too_many_pixels`` or ``broken_image``: a frame enlarges the picture.
    """
    with open_animated(media) as picture:
        size = picture.size
        for number in range(count):
            picture.seek(number)
            limits.check_size(picture.size, where)
            if picture.size != size:
                raise BadSampleError("broken_image", where, f"frame {number} has another size than the first")
            yield picture


def decode_frames(
    media: bytes, size: tuple[int, int], wanted: list[int], limits: DecodeLimits, where: str
) -> NDArray[np.uint8]:
    """Decodes frames to RGB ``[T, H, W, 3]``, upright and on white.

    Args:
        media: The file.
        size: Its (width, height) as stored.
        wanted: Numbers of frames in rising order; repeats are allowed.
        limits: Bounds.
        where: For messages.

    Raises:
        BadSampleError: ``too_many_pixels``, ``too_many_frames`` or ``broken_image``.
    """
    chosen = set(wanted)
    check_wanted(len(chosen), size, where)
    check_work(wanted[-1] + 1, size, where, moving="picture")
    orientation = picture_orientation(media)
    frames: dict[int, NDArray[np.uint8]] = {}
    for number, picture in enumerate(painted_frames(media, wanted[-1] + 1, limits, where)):
        if number in chosen:
            shown = on_white(np.asarray(picture.convert("RGBA")))
            frames[number] = upright(shown[None], orientation)[0]
    return gather_frames(frames, wanted)
