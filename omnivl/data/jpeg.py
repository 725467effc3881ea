"""Decodes JPEGs, also those with stray bytes between their parts, which every viewer shows.

The fast decoder refuses whatever libjpeg warns of. That is right for a file that was cut or damaged, whose missing part
libjpeg makes up; but stray bytes before a marker lose nothing. They are taken out, and the rest must decode without a
warning.
"""

import io
import re

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from omnivl.data.limits import DecodeLimits

_STRAY_AT_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_UNUSUAL = "Could not determine subsampling"  # of the fast decoder, which knows the usual ones
_PRINT = ("CMYK", "YCCK")
_SCAN, _END = 0xDA, 0xD9

SHRINKS = (8, 4, 2, 1)
"""By what the sides of a JPEG can be divided at no cost: libjpeg-turbo has fast inverse transforms of these sizes only.
Other fractions take longer than the whole picture does."""


def decode_jpeg(media: bytes, shrink: int, limits: DecodeLimits, where: str) -> NDArray[np.uint8]:
    """Decodes to RGB ``[H, W, 3]``, as it is stored (not turned).

    Args:
        media: The file.
        shrink: One of ``SHRINKS``: both sides are divided by it and rounded up. Pictures with unusual sampling of
            colours, and in the colours of print, are decoded in full.
        limits: Bounds on the size as the decoder itself finds it.
        where: For messages.

    Raises:
        BadSampleError: ``too_many_pixels``.
        ValueError: It is cut or damaged.
        OSError: Likewise, where its colours are those of print.
    """
    try:
        return _decoded(media, shrink, limits, where)
    except ValueError:
        clean = without_stray_bytes(media)
    try:
        return _decoded(clean, shrink, limits, where)
    except ValueError as error:
        stray = _STRAY_AT_END.search(str(error))
        end = clean.rfind(b"\xff\xd9")
        if stray is not None and end >= 0:
            return _decoded(clean[: end - int(stray[1])] + clean[end:], shrink, limits, where)
        if _UNUSUAL not in str(error):
            raise
        return _by_pillow(clean, limits, where)


def in_print_colours(media: bytes) -> bool:
    """Whether the colours of a JPEG are those of print.

    Raises:
        ValueError: Its header cannot be read.
    """
    return simplejpeg.decode_jpeg_header(media)[2] in _PRINT


def _decoded(media: bytes, shrink: int, limits: DecodeLimits, where: str) -> NDArray[np.uint8]:
    height, width, colour, _ = simplejpeg.decode_jpeg_header(media)
    limits.check_size((width, height), where)
    pixels: NDArray[np.uint8]
    if colour in _PRINT:
        simplejpeg.decode_jpeg(media, colorspace="CMYK")  # raises where Pillow would fill in what is missing
        return _by_pillow(media, limits, where)
    pixels = simplejpeg.decode_jpeg(
        media, colorspace="RGB", min_height=-(-height // shrink), min_width=-(-width // shrink)
    )
    return pixels


def _by_pillow(media: bytes, limits: DecodeLimits, where: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(media), formats=("JPEG",)) as picture:
        limits.check_size(picture.size, where)
        return np.asarray(picture.convert("RGB"))


def without_stray_bytes(media: bytes) -> bytes:
    """A JPEG without what lies between its segments and behind its end; a file without an end gets none."""
    kept = [media[:2]]
    place = 2
    while place + 2 <= len(media):
        marker = media[place + 1]
        if media[place] != 0xFF or marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            place += 1 if media[place] != 0xFF or marker == 0xFF else 2
            continue
        if marker == _END:
            kept.append(media[place : place + 2])
            break
        end = place + 2 + int.from_bytes(media[place + 2 : place + 4], "big")
        if marker == _SCAN:
            end = _end_of_scan(media, end)
        kept.append(media[place:end])
        place = end
    return b"".join(kept)


def _end_of_scan(media: bytes, place: int) -> int:
    """Where the coded data of a scan end: at the next marker that is no restart and no escaped 0xFF."""
    while True:
        place = media.find(b"\xff", place)
        if place < 0 or place + 1 >= len(media):
            return len(media)
        following = media[place + 1]
        if following not in (0x00, 0xFF) and not 0xD0 <= following <= 0xD7:
            return place
        place += 1 if following == 0xFF else 2
