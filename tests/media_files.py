"""Small pictures and clips in every form that the loader takes, red on the left and blue below."""

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Pixels = NDArray[np.uint8]
SIDES = (66, 48)  # width, height


def scene(number: int = 0) -> Pixels:
    """uint8 ``[48, 66, 3]``: smooth, different in each corner, and with each number."""
    width, height = SIDES
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    red, green, blue = 230 * (1 - across), 60 + 15 * number + 0 * down, 220 * down
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def saved(form: str, mode: str = "RGB", count: int = 1, **options: object) -> bytes:
    """A file of Pillow's."""
    frames = [Image.fromarray(scene(number)).convert(mode, dither=Image.Dither.NONE) for number in range(count)]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if count > 1 else {}
    frames[0].save(file, form, **more, **options)
    return file.getvalue()


def encoded(pixels: NDArray[np.generic], extension: str = ".png") -> bytes:
    """A file of OpenCV's, from grey, RGB or RGBA."""
    if pixels.ndim == 3:
        pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
    return cv2.imencode(extension, pixels)[1].tobytes()


def oriented(form: str, value: int) -> bytes:
    """A picture that EXIF turns."""
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


def old_bitmap() -> bytes:
    """A BMP with the header of OS/2."""
    width, height = SIDES
    row = (3 * width + 3) // 4 * 4
    pixels = b"".join(line[:, ::-1].tobytes().ljust(row, b"\0") for line in scene()[::-1])
    sizes = b"".join(number.to_bytes(2, "little") for number in (width, height, 1, 24))
    head = b"\x0c\0\0\0" + sizes
    return b"BM" + (26 + len(pixels)).to_bytes(4, "little") + bytes(4) + (26).to_bytes(4, "little") + head + pixels


def pictures() -> Iterator[tuple[str, str, bytes]]:
    """Name, extension and bytes of pictures."""
    wide = scene().astype(np.uint16) * 257
    grey = wide[:, :, 0]
    alpha = np.linspace(0, 65535, grey.size).reshape(grey.shape).astype(np.uint16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    jpeg = saved("JPEG", quality=95)
    yield from (
        ("JPEG", "jpg", jpeg),
        ("JPEG, progressive", "jpeg", saved("JPEG", quality=95, progressive=True)),
        ("JPEG, grey", "jpg", saved("JPEG", "L", quality=95)),
        ("JPEG, CMYK", "jpg", saved("JPEG", "CMYK", quality=95)),
        ("JPEG, foreign profile", "jpg", saved("JPEG", quality=95, icc_profile=profile)),
        ("JPEG, stray bytes", "jpg", jpeg[:20] + b"xyz" + jpeg[20:-2] + bytes(9) + jpeg[-2:] + b"behind"),
        ("MPO", "jpg", saved("MPO", count=2, quality=95)),
        ("JPEG, gain map", "jpg", jpeg + saved("JPEG", "L", quality=50)),
        ("PNG", "png", saved("PNG")),
        ("PNG, grey", "png", saved("PNG", "L")),
        ("PNG, 1 bit", "png", saved("PNG", "1")),
        ("PNG, palette", "png", saved("PNG", "P")),
        ("PNG, palette, transparent", "png", saved("PNG", "P", transparency=3)),
        ("PNG, grey, transparent", "png", saved("PNG", "L", transparency=120)),
        ("PNG, RGB, transparent", "png", saved("PNG", transparency=(230, 60, 0))),
        ("PNG, grey and alpha", "png", encoded(np.dstack([scene(), alpha >> 8]).astype(np.uint8))),
        ("PNG, 16 bits of grey", "png", encoded(grey)),
        ("PNG, 16 bits of colour", "png", encoded(wide)),
        ("PNG, 16 bits and alpha", "png", encoded(np.dstack([wide, alpha]))),
        ("APNG", "png", saved("PNG", count=3)),
        ("APNG, default image apart", "png", saved("PNG", count=3, default_image=True)),
        ("WebP", "webp", saved("WEBP", quality=90)),
        ("WebP, lossless, alpha", "webp", saved("WEBP", "RGBA", lossless=True)),
        ("GIF", "gif", saved("GIF")),
        ("GIF, transparent", "gif", saved("GIF", "P", transparency=5)),
        ("BMP", "bmp", saved("BMP")),
        ("BMP, palette", "bmp", saved("BMP", "P")),
        ("BMP, grey", "bmp", saved("BMP", "L")),
        ("BMP, OS/2", "bmp", old_bitmap()),
    )
    for form, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        yield from ((f"{form}, orientation {value}", extension, oriented(form, value)) for value in range(2, 9))


def clip(
    form: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    *,
    times: tuple[int, ...] = tuple(range(0, 1200, 100)),
    turn: tuple[int, bool] = (0, False),
    sound: bool = False,
    sides: tuple[int, int] = SIDES,
    colours: int | None = None,
    **options: str,
) -> bytes:
    """A clip whose frames are shown at these milliseconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = *sides, pixel_format
        if set(times) != set(range(0, 1200, 100)):
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if colours is not None:
            stream.codec_context.colorspace = colours
        if turn != (0, False):
            stream.set_display_rotation(turn[0], hflip=turn[1])
        speech = container.add_stream("aac", rate=8000) if sound else None
        for number, time in enumerate(times):
            pixels = cv2.resize(scene(number), sides)
            opaque = np.full(pixels.shape[:2], 255, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(np.dstack([pixels, opaque]), format="rgba")
            frame = frame.reformat(format=pixel_format, dst_colorspace=colours)
            ticks = stream.codec_context.time_base or Fraction(1, 10)
            frame.pts, frame.time_base = round(Fraction(time, 1000) / ticks), ticks
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if speech is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
            tone.sample_rate = 8000
            container.mux(speech.encode(tone))
            container.mux(speech.encode(None))
    return file.getvalue()


VARYING = (0, 33, 47, 120, 121, 500, 501, 900, 2000, 2001, 2040, 3000)


def clips() -> Iterator[tuple[str, str, bytes]]:
    """Name, extension and bytes of clips, of 12 frames each."""
    durations = [40, 70, 0, 90, 100, 20, 30, 1000, 40, 40, 60, 500]
    files = {}
    for form in ("WEBP", "GIF"):
        file = io.BytesIO()
        distinct = [Image.fromarray(scene(number)) for number in range(12)]
        distinct[0].save(file, form, save_all=True, append_images=distinct[1:], duration=durations, loop=3)
        files[form] = file.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 7
    file = io.BytesIO()
    distinct[0].save(file, "WEBP", save_all=True, append_images=distinct[1:], duration=durations, exif=exif)
    files["turned"] = file.getvalue()
    yield from (
        ("MP4", "mp4", clip()),
        ("MP4, sound", "mp4", clip(sound=True)),
        ("MP4, B-frames", "mp4", clip(**{"x264-params": "bframes=3:b-adapt=0"})),
        ("MP4, without B-frames", "mp4", clip(bf="0")),
        ("MP4, varying rate", "mp4", clip(times=VARYING)),
        ("MP4, late start", "mp4", clip(times=tuple(time + 1500 for time in VARYING))),
        ("MP4, fragments", "mp4", clip(movflags="frag_keyframe+empty_moov")),
        ("MP4, turned", "mp4", clip(turn=(90, False))),
        ("MOV, turned back", "mov", clip("mov", turn=(-90, False))),
        ("MP4, upside down", "mp4", clip(turn=(180, False))),
        ("MP4, mirrored", "mp4", clip(turn=(0, True))),
        ("MOV, turned and mirrored", "mov", clip("mov", turn=(90, True))),
        ("MP4, odd sides", "mp4", clip(codec="libx264", pixel_format="yuv444p", sides=(67, 49))),
        ("MP4, BT.709", "mp4", clip(colours=1)),
        ("MP4, 10 bits", "mp4", clip(codec="libx265", pixel_format="yuv420p10le", **{"x265-params": "log-level=0"})),
        ("M4V, MPEG-4", "m4v", clip(codec="mpeg4")),
        ("MKV, varying rate", "mkv", clip("matroska", times=VARYING)),
        ("MKV, lossless", "mkv", clip("matroska", "ffv1")),
        ("WebM, VP8", "webm", clip("webm", "libvpx")),
        ("WebM, VP9", "webm", clip("webm", "libvpx-vp9")),
        ("WebM, alpha", "webm", clip("webm", "libvpx-vp9", "yuva420p")),
        ("AVI, MPEG-4", "avi", clip("avi", "mpeg4")),
        ("AVI, motion JPEG", "avi", clip("avi", "mjpeg", "yuvj420p")),
        ("MPEG-TS", "mpg", clip("mpegts", "mpeg2video")),
        ("MPEG program", "mpeg", clip("mpeg", "mpeg2video")),
        ("MPEG-4 alone, without times", "m4v", clip("m4v", "mpeg4")),
        ("MOV, ProRes", "mov", clip("mov", "prores_ks", "yuv422p10le")),
        ("GIF, moving", "gif", files["GIF"]),
        ("WebP, moving", "webp", files["WEBP"]),
        ("WebP, moving, turned", "webp", files["turned"]),
    )
