"""The formats that are read, and the size of a picture from its first bytes.

The first bytes of a file decide its format; the extension only decides whether it is opened. Formats that are not in
these tables are refused: there is no fallback decoder, and no decoder that could run code.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

PictureFormat = Literal["jpeg", "png", "webp", "gif", "bmp"]

STILL_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
CLIP_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "gif"})
MEDIA_EXTENSIONS = STILL_EXTENSIONS | CLIP_EXTENSIONS
TEXT_EXTENSIONS = ("json", "txt", "cls")

_SIGNATURES: tuple[tuple[bytes, PictureFormat], ...] = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
)


def file_named(wanted: str, names: Iterable[str]) -> str | None:
    """The first of the names that equals ``wanted``, or ``wanted`` with the extension of a picture or clip."""
    for name in names:
        stem, _, extension = name.rpartition(".")
        if name == wanted or (stem == wanted and extension in MEDIA_EXTENSIONS):
            return name
    return None


def picture_format(data: bytes) -> PictureFormat | None:
    """The format by the first bytes; None for anything else (a video, a broken file)."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)


def is_animated(data: bytes) -> bool:
    """Whether a WebP's header declares an animation. Needs the first 21 bytes; GIF counts as a clip by its name."""
    return picture_format(data) == "webp" and data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 2)


def moves(data: bytes) -> bool:
    """Whether a picture's format and header let it have several frames: GIF, animated WebP, animated PNG."""
    match picture_format(data):
        case "gif":
            return True
        case "png":
            return b"acTL" in data[: data.find(b"IDAT")]
        case _:
            return is_animated(data)


def picture_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from the header, without decoding; None where the header is broken."""
    try:
        match picture_format(data):
            case "png":
                if data[12:16] != b"IHDR":
                    return None
                width, height = struct.unpack(">II", data[16:24])
            case "gif":
                extent = gif_extent(data)
                width, height = extent.width, extent.height
            case "bmp":
                old = data[14:18] == b"\x0c\0\0\0"  # the header of OS/2, with sides of 16 bits
                width, height = struct.unpack("<HH", data[18:22]) if old else struct.unpack("<ii", data[18:26])
            case "webp":
                return _webp_size(data)
            case "jpeg":
                return _jpeg_size(data)
            case None:
                return None
    except (struct.error, IndexError):
        return None
    return (abs(width), abs(height)) if width and height else None


def is_complete(data: bytes) -> bool:
    """Whether a PNG or WebP file is complete.

    OpenCV fills missing parts with grey without an error, and takes the memory that a PNG's chunk claims to need.
    """
    match picture_format(data):
        case "png":
            return _png_is_complete(data)
        case "webp":
            return len(data) >= int.from_bytes(data[4:8], "little") + 8
        case _:
            return True


def _png_is_complete(data: bytes) -> bool:
    place = 8
    while place + 12 <= len(data):
        kind, size = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], "big")
        place += 12 + size
        if kind == b"IEND":
            return place <= len(data)
    return False


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        case b"VP8L":
            bits = struct.unpack("<I", data[21:25])[0]
            return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
        case b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
        case _:
            return None


@dataclass(frozen=True)
class GifExtent:
    """What a GIF's frames cover.

    Attributes:
        width: Of the screen, or what its frames reach where they exceed it: a decoder enlarges the screen to them.
        height: Likewise.
        durations: Milliseconds of each frame.
    """

    width: int
    height: int
    durations: tuple[int, ...]


def gif_extent(data: bytes) -> GifExtent:
    """Walks over all frames of a GIF, or of as much of it as there is, as Pillow's decoder does.

    That is: bytes between blocks that start none are passed over, and an extension has at least one block before the
    empty one that ends it.

    Raises:
        struct.error: The header is cut.
        IndexError: Likewise.
    """
    width, height = struct.unpack("<HH", data[6:10])
    place, duration, durations = 13 + _colours(data[10]), 0, []
    while place < len(data) and data[place] != 0x3B:
        if data[place] == 0x21:
            if data[place + 1 : place + 2] == b"\xf9":  # hundredths of a second, for the frame that follows
                duration = 10 * int.from_bytes(data[place + 4 : place + 6], "little")
            place = _skip_extension(data, place + 1, first=not durations)
        elif data[place] == 0x2C and len(data) >= place + 10:
            left, top, wide, high = struct.unpack("<HHHH", data[place + 1 : place + 9])
            width, height = max(width, left + wide), max(height, top + high)
            durations.append(duration)
            place, duration = _skip_blocks(data, place + 11 + _colours(data[place + 9])), 0
        else:
            place += 1
    return GifExtent(width, height, tuple(durations))


def _skip_extension(data: bytes, place: int, *, first: bool) -> int:
    label, block = data[place : place + 1], data[place + 2 : place + 13]
    if label == b"\xfe":  # a comment
        return _skip_blocks(data, place + 1)
    place = _skip_block(data, place + 1)
    if label == b"\xff" and first and block == b"NETSCAPE2.0":
        place = _skip_block(data, place)
    return _skip_blocks(data, place)


def _skip_block(data: bytes, place: int) -> int:
    return place + 1 + (data[place] if place < len(data) else 0)


def _skip_blocks(data: bytes, place: int) -> int:
    """The place behind a chain of blocks and the empty one that ends it."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    return place + 1


def _colours(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Walks the segments to the start-of-frame one; it can lie behind a long EXIF block."""
    place = 2
    while place + 9 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker == 0xFF:
            place += 1  # stray bytes and fill bytes, over which libjpeg passes
        elif marker in (0xD9, 0xDA):
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return (width, height) if width and height else None
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            place += 2
        else:
            place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return None
