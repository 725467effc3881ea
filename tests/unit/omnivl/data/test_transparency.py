"""What is transparent is white, in every format of pictures and clips that holds transparency."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from omnivl.data.decode import decode_clip, decode_still
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import Sample
from omnivl.data.transparency import frame_on_white

LIMITS = DecodeLimits()
RED, HALF, WHITE = (200, 0, 0), (228, 127, 127), (255, 255, 255)  # half: 200 * 128 / 255 + 127 = 227.4, and 127


def thirds() -> np.ndarray:
    """16 x 48 pixels of red: a third opaque, a third half transparent, a third transparent."""
    rgba = np.zeros((16, 48, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, :16, 3], rgba[:, 16:32, 3] = 255, 128
    return rgba


def clip(form: str, codec: str, pixel_format: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}  # with it, it encodes no alpha
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 48, 16, pixel_format
        for _ in range(12):
            frame = av.VideoFrame.from_ndarray(thirds(), format="rgba")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode(None))
    return file.getvalue()


def middles(frame: np.ndarray) -> np.ndarray:
    return frame[8, [8, 24, 40]].astype(int)


@pytest.mark.parametrize(
    ("form", "codec", "pixel_format"),
    [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
        ("matroska", "libvpx-vp9", "yuva420p"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("mov", "rawvideo", "rgba"),
        ("matroska", "ffv1", "yuva420p"),
        ("avi", "utvideo", "gbrap"),
        ("avi", "huffyuv", "bgra"),
    ],
)
@pytest.mark.parametrize("places", [[0, 11], [11], list(range(12))])
def test_clips(form, codec, pixel_format, places):
    media = clip(form, codec, pixel_format)
    frames = decode_clip(Sample("k", "s", media, "mkv"), LIMITS, lambda total: places)
    assert len(frames) == len(places)
    for frame in frames:
        assert np.abs(middles(frame) - [RED, HALF, WHITE]).max() <= 4


@pytest.mark.parametrize("form", ["WEBP", "GIF"])
def test_animated_pictures(form):
    first, second = thirds(), thirds()[:, ::-1].copy()
    if form == "GIF":  # it knows no half
        first[..., 3], second[..., 3] = (np.where(one[..., 3] > 200, 255, 0) for one in (first, second))
    file = io.BytesIO()
    frames = [Image.fromarray(one) for one in (first, second)]
    options = {"lossless": True} if form == "WEBP" else {"disposal": 2}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=50, loop=0, **options)
    shown = decode_clip(Sample("k", "s", file.getvalue(), form.lower()), LIMITS, lambda total: range(total))
    middle = HALF if form == "WEBP" else WHITE
    assert np.abs(middles(shown[0]) - [RED, middle, WHITE]).max() <= 1
    assert np.abs(middles(shown[1]) - [WHITE, middle, RED]).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("1", 1), ("L", 128), ("I;16", 30_000), ("P", 7), ("RGB", (9, 8, 7))])
@pytest.mark.parametrize("moving", [False, True])
def test_a_transparent_value_of_png(mode, key, moving):
    """The left half has the transparent value; the right half is opaque black."""
    if mode == "I;16":
        picture = Image.fromarray(np.repeat([[key] * 4 + [0] * 4], 4, axis=0).astype(np.uint16))
    else:
        picture = Image.new(mode, (8, 4))
        picture.paste(key, (0, 0, 4, 4))
    if mode == "P":
        picture.putpalette([0, 0, 0] + [50, 60, 70] * 255)
    file = io.BytesIO()
    more = {"save_all": True, "append_images": [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]} if moving else {}
    picture.save(file, "PNG", transparency=key, **more)
    shown = decode_still(Sample("k", "s", file.getvalue(), "png"), LIMITS)[0]
    assert shown[0, 1].tolist() == [255, 255, 255]
    assert shown[0, 6].tolist() == [0, 0, 0]


@pytest.mark.parametrize("default_image", [True, False])
def test_the_default_image_of_an_animated_png(default_image):
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "lime", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], default_image=default_image)
    shown = decode_still(Sample("k", "s", file.getvalue(), "png"), LIMITS)[0]
    assert shown[2, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("pixel_format", ["yuva420p", "yuva422p", "yuva444p10le", "gbrap", "argb", "rgba64le", "ya8"])
@pytest.mark.parametrize("width", [64, 66, 67, 33, 5])
def test_each_column_of_a_frame_has_its_alpha(pixel_format, width):
    alpha = np.random.default_rng(width).integers(0, 256, (24, width), dtype=np.uint8)
    black = np.zeros((24, width, 4), dtype=np.uint8)
    black[..., 3] = alpha
    frame = av.VideoFrame.from_ndarray(black, format="rgba").reformat(format="gbrap")
    frame = frame.reformat(format=pixel_format, threads=1)
    shown = frame_on_white(frame)
    assert np.abs(shown.astype(int) - (255 - alpha.astype(int))[..., None]).max() <= 2
