"""JPEGs with bytes that belong to nothing decode like those without; what is cut or lacks data does not."""

import io

import numpy as np
import pytest
from PIL import Image

from omnivl.data.decode import decode_still
from omnivl.data.formats import picture_size
from omnivl.data.jpeg import SHRINKS, decode_jpeg, without_stray_bytes
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import BadSampleError, Sample

LIMITS = DecodeLimits()


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    shades = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shades).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def decoded(media: bytes, needed: int = 0) -> np.ndarray:
    return decode_still(Sample("k", "s", media, "jpg"), LIMITS, needed)[0]


def segments(media: bytes) -> list[int]:
    """Where each segment begins, up to the first scan."""
    places, place = [], 2
    while media[place + 1] != 0xDA:
        places.append(place)
        place += 2 + int.from_bytes(media[place + 2 : place + 4], "big")
    return [*places, place]


@pytest.mark.parametrize("stray", [b"\0", b"xyz", b"\xff\xff\xff", b"\xff\0", b"\0" * 300, b"\n"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}), ("RGB", {"restart_marker_rows": 1})],
)
def test_stray_bytes_before_any_marker_and_at_the_end(mode, options, stray):
    good = jpeg(mode, **options)
    expected = decoded(good)
    places = [*segments(good)[1:], len(good) - 2, len(good)]  # a viewer wants the first one at once
    for place in places:
        media = good[:place] + stray + good[place:]
        assert picture_size(media) == (60, 40)
        assert np.array_equal(decoded(media), expected), (place, places)
    everywhere = good
    for place in reversed(places):
        everywhere = everywhere[:place] + stray + everywhere[place:]
    assert np.array_equal(decoded(everywhere), expected)
    assert without_stray_bytes(good) == good


def test_a_fraction_of_the_size_is_decoded_all_the_same():
    good = jpeg()
    assert np.array_equal(decoded(good[:-2] + b"abcdefgh" + good[-2:], 10), decoded(good, 10))


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"progressive": True}), ("CMYK", {}), ("L", {}), ("RGB", {"restart_marker_rows": 1})],
)
@pytest.mark.parametrize("end", [b"", b"\xff\xd9", b"\0" * 64])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_cut_file_is_refused(mode, options, end, share):
    good = jpeg(mode, **options, quality=95)
    start = segments(good)[-1] + 20
    cut = good[: start + round((len(good) - start) * share)]
    stray = segments(good)[1]
    for media in (cut + end, cut[:stray] + b"xyz" + cut[stray:] + end):
        with pytest.raises(BadSampleError) as caught:
            decoded(media)
        assert caught.value.rejection.cause == "broken_image"


@pytest.mark.parametrize("shrink", SHRINKS)
def test_sides_are_divided_and_rounded_up(shrink):
    """By nothing else: other fractions, which libjpeg has as well, take longer than the whole picture."""
    shades = np.linspace(0, 255, 301 * 517 * 3).reshape(301, 517, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shades).save(file, "JPEG")
    pixels = decode_jpeg(file.getvalue(), shrink, LIMITS, "s")
    assert pixels.shape == (-(-301 // shrink), -(-517 // shrink), 3)
    for needed in (301 // shrink, 301 // shrink - 10):
        assert decoded(file.getvalue(), needed).shape == pixels.shape
    assert decoded(file.getvalue(), 301 // shrink + 1).shape[0] == {8: 76, 4: 151}.get(shrink, 301)


def test_unusual_sampling_of_colours_is_read():
    """Chroma that is sampled twice as finely as brightness: libjpeg reads it, the fast decoder does not know it."""
    media = bytearray(jpeg(subsampling=0))
    frame = media.index(b"\xff\xc0")
    media[frame + 11], media[frame + 14], media[frame + 17] = 0x11, 0x21, 0x21
    assert decoded(bytes(media)).shape == (40, 60, 3)
