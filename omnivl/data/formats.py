"""The formats that are read, and the size of a picture from its first bytes.

The first bytes of a file decide its format; the extension only decides whether it is opened. Formats that are not in
these tables are refused: there is no fallback decoder, and no decoder that could run code.
"""

import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal, NamedTuple

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
    """Whether a WebP's header declares an animation, be it of one frame. Needs the first 21 bytes."""
    return picture_format(data) == "webp" and data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 2)


def may_move(data: bytes) -> bool:
    """Whether a picture's format can hold several frames in turn. Needs the first 21 bytes."""
    return picture_format(data) == "gif" or is_animated(data)


def is_clip(extension: str, data: bytes) -> bool:
    """Whether a file is a clip: a video, or a GIF or WebP of more than one frame.

    A second picture inside a JPEG, and the animation of a PNG, do not make it one: it is the picture that viewers show.

    Args:
        extension: Its lower-case extension without dot.
        data: Its bytes. Of a GIF or WebP (``may_move``), those up to the header of the second frame at least.
    """
    match picture_format(data):
        case None:
            return extension in CLIP_EXTENSIONS
        case "gif":
            return sum(1 for _ in islice(_gif_frames(data), 2)) == 2
        case "webp":
            return is_animated(data) and sum(1 for _ in islice(_webp_frames(data), 2)) == 2
        case _:
            return False


def picture_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from the header, without decoding; None where the header is broken."""
    try:
        match picture_format(data):
            case "png":
                if data[12:16] != b"IHDR":
                    return None
                width, height = struct.unpack(">II", data[16:24])
            case "gif":
                width, height = _gif_size(data)
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


def frame_durations(data: bytes) -> list[int]:
    """Milliseconds of every frame of a GIF or an animated WebP (``may_move``)."""
    if picture_format(data) == "gif":
        return [frame.duration for frame in _gif_frames(data)]
    # bytes 12 to 14 of each chunk's content
    return [int.from_bytes(data[place + 20 : place + 23], "little") for place in _webp_frames(data)]


def _webp_frames(data: bytes) -> Iterator[int]:
    """Where the chunk of each frame (ANMF) of an animated WebP begins."""
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"ANMF":
            yield place
        place += 8 + size + size % 2


class _GifFrame(NamedTuple):
    """Which part of the screen a frame covers, and its milliseconds."""

    left: int
    top: int
    width: int
    height: int
    duration: int


def _gif_size(data: bytes) -> tuple[int, int]:
    """The screen, or what its frames reach where they exceed it: a decoder enlarges the screen to them."""
    width, height, _ = struct.unpack("<HHB", data[6:11])
    for frame in _gif_frames(data):
        width, height = max(width, frame.left + frame.width), max(height, frame.top + frame.height)
    return width, height


def _gif_frames(data: bytes) -> Iterator[_GifFrame]:
    """Walks over the frames of a GIF, or of as much of it as there is, as Pillow's decoder does.

    That is: bytes between blocks that start none are passed over, and an extension has at least one block before the
    empty one that ends it.
    """
    place, duration, first = 13 + (_colours(data[10]) if len(data) > 10 else 0), 0, True
    while place < len(data) and data[place] != 0x3B:
        if data[place] == 0x21:
            if data[place + 1 : place + 2] == b"\xf9":  # hundredths of a second, for the frame that follows
                duration = 10 * int.from_bytes(data[place + 4 : place + 6], "little")
            place = _skip_extension(data, place + 1, first=first)
        elif data[place] == 0x2C and len(data) >= place + 10:
            left, top, wide, high = struct.unpack("<HHHH", data[place + 1 : place + 9])
            yield _GifFrame(left, top, wide, high, duration)
            place, duration, first = _skip_blocks(data, place + 11 + _colours(data[place + 9])), 0, False
        else:
            place += 1


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


def leading_metadata(data: bytes) -> bytes:
    """The part of a JPEG, PNG or WebP in which its EXIF and XMP can lie, before any pixel is decoded.

    That is all before the first scan of a JPEG, nothing of a WebP whose header declares neither, else the whole file.
    """
    match picture_format(data):
        case "jpeg":
            return data[: _jpeg_scan(data)]
        case "webp" if data[12:16] != b"VP8X" or (len(data) > 20 and not data[20] & 0x0C):
            return b""
        case _:
            return data


def _jpeg_scan(data: bytes) -> int:
    """Where the first scan of a JPEG begins; its length where bytes lie between the segments before."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:
            return place
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:
            break  # no segment with a length
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


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
