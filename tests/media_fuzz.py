"""Pictures, clips and texts of every form that the loader takes, and damaged copies of them."""

import io
import json
from collections.abc import Iterator

import av
import cv2
import numpy as np
from PIL import Image

_SIZE = (30, 20)
_EXTREMES = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\0")


def good_files() -> dict[str, tuple[bytes, str]]:
    """By name the bytes and the extension of a file that is whole."""
    files = {f"jpeg {name}": (data, "jpg") for name, data in _jpegs()}
    files |= {f"png {name}": (data, "png") for name, data in _pngs()}
    files |= {f"webp {name}": (data, "webp") for name, data in _webps()}
    files |= {f"gif {name}": (data, "gif") for name, data in _gifs()}
    files |= {f"bmp {mode}": (_saved("BMP", mode), "bmp") for mode in ("1", "L", "P", "RGB", "RGBA")}
    files |= {f"clip {name}": (data, extension) for name, data, extension in _clips()}
    return files


def good_records() -> list[dict[str, bytes]]:
    """Text members of samples, by extension."""
    rows: list[dict[str, object]] = [
        {"caption": "a red ball on the left", "label": "ball", "identity": "7", "answers": ["a", "b"]},
        {"captions": {"en": ["one", "two"], "de": "drei"}, "boxes": [[0.1, 0.2, 0.5, 0.9]], "flip": False},
        {"captions": ["w\u00fcrfel \U0001f436", "x"], "count": 3, "boxes": [0.0, 0.0, 1.0, 1.0], "label": 4},
    ]
    return [{"json": json.dumps(row).encode()} for row in rows] + [{"txt": b"a caption", "cls": b"cat"}]


def damaged(data: bytes, random: np.random.Generator, other: bytes) -> bytes:
    """A copy that is cut, or has bytes flipped, swapped, repeated, or taken from another file."""
    bad = bytearray(data)
    for _ in range(int(random.integers(1, 4))):
        if not bad:
            break
        place, length = int(random.integers(len(bad))), int(random.integers(1, 33))
        # Most of what decides how a file is read stands at its beginning.
        place = place % 64 if random.random() < 0.3 else place
        match int(random.integers(8)):
            case 0:
                del bad[place:]
            case 1:
                bad[place] ^= 1 << int(random.integers(8))
            case 2:
                bad[place] = int(random.integers(256))
            case 3:
                bad[place : place + 4] = random.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\0"]
                )
            case 4:
                there = int(random.integers(len(bad)))
                first, second = bad[place : place + length], bad[there : there + length]
                if len(first) == len(second) and abs(place - there) >= length:
                    bad[place : place + length], bad[there : there + length] = second, first
            case 5:
                del bad[place : place + length]
            case 6:
                bad[place:place] = bad[place : place + length]
            case _:
                bad[place : place + length] = other[place : place + length]
    return bytes(bad)


def _saved(name: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    values = np.linspace(0, 255, _SIZE[0] * _SIZE[1] * 3).reshape(_SIZE[1], _SIZE[0], 3).astype(np.uint8)
    Image.fromarray(values).convert(mode).save(file, name, **options)
    return file.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    return exif.tobytes()


def _frames(mode: str = "RGB") -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (value, 9, value)).convert(mode) for value in (40, 70, 100, 130)]


def _moving(name: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    first, *others = _frames(mode)
    first.save(file, name, save_all=True, append_images=others, duration=40, **options)
    return file.getvalue()


def _jpegs() -> Iterator[tuple[str, bytes]]:
    for mode in ("RGB", "L", "CMYK"):
        yield mode, _saved("JPEG", mode)
        yield f"progressive {mode}", _saved("JPEG", mode, progressive=True)
    yield "restarts", _saved("JPEG", restart_marker_blocks=1, subsampling=0)
    yield "turned", _saved("JPEG", exif=_exif(6))
    yield "two pictures", _moving("MPO")


def _pngs() -> Iterator[tuple[str, bytes]]:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield mode, _saved("PNG", mode) if mode != "I;16" else _deep((20, 30))
    yield "48 bits", _deep((20, 30, 3))
    yield "64 bits", _deep((20, 30, 4))
    yield "palette of 2 bits", _saved("PNG", "P", bits=2)
    yield "grey key", _saved("PNG", "L", transparency=120)
    yield "colour key", _saved("PNG", "RGB", transparency=(0, 0, 0))
    yield "palette with alpha", _saved("PNG", "P", transparency=bytes(range(200)))
    yield "turned", _saved("PNG", exif=_exif(5))
    yield "moving", _moving("PNG", "RGBA")
    yield "interlaced", _interlaced()


def _deep(shape: tuple[int, ...]) -> bytes:
    return cv2.imencode(".png", np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape) * 13)[1].tobytes()


def _interlaced() -> bytes:
    """One pixel by Adam7: the first pass has it, the others are empty."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = b"\0\0\0\x01\0\0\0\x01\x08\x02\0\0\x01"
    picture = chunk(b"IDAT", zlib.compress(b"\0\x10\x20\x30"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + picture + chunk(b"IEND", b"")


def _webps() -> Iterator[tuple[str, bytes]]:
    yield "lossy", _saved("WEBP")
    yield "lossless", _saved("WEBP", lossless=True)
    yield "alpha", _saved("WEBP", "RGBA")
    yield "turned", _saved("WEBP", exif=_exif(8))
    yield "moving", _moving("WEBP", "RGBA")


def _gifs() -> Iterator[tuple[str, bytes]]:
    yield "still", _saved("GIF")
    yield "interlaced", _saved("GIF", interlace=True)
    yield "transparent", _saved("GIF", "P", transparency=3)
    yield "moving", _moving("GIF")
    yield "restoring", _moving("GIF", "P", disposal=3, loop=0)
    yield "clearing", _moving("GIF", "P", disposal=2, comment=b"a comment")


def _clips() -> Iterator[tuple[str, bytes, str]]:
    kinds = [
        ("mp4", "mpeg4", "mp4"),
        ("mp4", "libx264", "m4v"),
        ("mov", "libx264", "mov"),
        ("mov", "mjpeg", "mov"),
        ("matroska", "libx264", "mkv"),
        ("webm", "libvpx", "webm"),
        ("webm", "libvpx-vp9", "webm"),
        ("avi", "mpeg4", "avi"),
        ("avi", "mjpeg", "avi"),
        ("mpegts", "mpeg2video", "mpg"),
        ("mpeg", "mpeg1video", "mpeg"),
        ("flv", "flv", "avi"),
    ]
    for container, codec, extension in kinds:
        yield f"{container} {codec}", _clip(container, codec), extension


def _clip(name: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=name) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 3
        if name == "mov":
            stream.set_display_rotation(90)
        for number in range(6):
            pixels = np.full((32, 32, 3), 40 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
