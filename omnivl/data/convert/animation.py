"""Writes animated WebP frame by frame.

Pillow and libwebp's own writer merge frames that are equal, and those of no duration: the number of frames, and with it
what a model is shown, would change.

Source: RFC 9649, sections 2.7.1.1 (ANIM, ANMF) and 2.7.1.2.
"""

import io
from collections.abc import Iterable

from PIL import Image

_QUALITY = 90
_LONGEST_DURATION = 2**24 - 1
_ANIMATION, _ALPHA = 0x02, 0x10  # flags of VP8X
_NO_BLENDING = 0x02  # of ANMF: a frame replaces the one before


def write_webp(frames: Iterable[tuple[Image.Image, int]], repeats: int) -> bytes:
    """An animated WebP of exactly these frames.

    Args:
        frames: RGBA pictures of one size, with their durations in milliseconds.
        repeats: How often it plays; 0 for without end.
    """
    parts: list[bytes] = []
    width = height = 0
    for picture, duration in frames:
        width, height = picture.size
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=_QUALITY)
        head = bytes(6) + _three(width - 1) + _three(height - 1) + _three(min(max(duration, 0), _LONGEST_DURATION))
        parts.append(_chunk(b"ANMF", head + bytes([_NO_BLENDING]) + _pixel_chunks(out.getvalue())))
    screen = bytes([_ANIMATION | _ALPHA, 0, 0, 0]) + _three(width - 1) + _three(height - 1)
    loop = bytes(4) + min(repeats, 0xFFFF).to_bytes(2, "little")
    body = b"WEBP" + _chunk(b"VP8X", screen) + _chunk(b"ANIM", loop) + b"".join(parts)
    return _chunk(b"RIFF", body)


def _pixel_chunks(still: bytes) -> bytes:
    """The chunks of a still WebP that hold its pixels."""
    kept = b""
    place = 12
    while place < len(still):
        size = int.from_bytes(still[place + 4 : place + 8], "little")
        end = place + 8 + size + size % 2
        if still[place : place + 4] in (b"ALPH", b"VP8 ", b"VP8L"):
            kept += still[place:end]
        place = end
    return kept


def _three(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _chunk(name: bytes, payload: bytes) -> bytes:
    return name + len(payload).to_bytes(4, "little") + payload + b"\0" * (len(payload) % 2)
