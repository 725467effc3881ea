"""Index, stream, inspection and conversion agree on what is a picture and what a clip, by the file's content."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.convert.media import examine
from omnivl.data.decode import evaluation_frames
from omnivl.data.formats import is_clip, picture_size
from omnivl.data.index import build_index
from omnivl.data.inspect_media import media_facts, moves
from omnivl.data.sources.base import Sample
from omnivl.data.sources.stream import StreamReader

SHADES = (250, 150, 50)


def noise(shade: int) -> Image.Image:
    """120 x 100 pixels that do not compress, so that a second frame lies far behind the first."""
    return Image.fromarray(np.random.default_rng(shade).integers(0, shade, (100, 120, 3), dtype=np.uint8))


def saved(form: str, count: int, **options: object) -> bytes:
    frames = [noise(shade) for shade in SHADES[:count]]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if count > 1 else {}
    frames[0].save(file, form, **more, **options)
    return file.getvalue()


def one_frame_webp() -> bytes:
    """An animation of a single frame, as some exporters write it."""
    still = saved("WEBP", 1, quality=80)[12:]
    sides = (119).to_bytes(3, "little") + (99).to_bytes(3, "little")
    frame = bytes(6) + sides + (100).to_bytes(3, "little") + b"\2" + still
    chunks = b"VP8X" + (10).to_bytes(4, "little") + b"\2\0\0\0" + sides
    chunks += b"ANIM" + (6).to_bytes(4, "little") + bytes(6) + b"ANMF" + len(frame).to_bytes(4, "little") + frame
    return b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks


def with_stray_bytes(gif: bytes) -> bytes:
    """Zeros between the blocks of a GIF, over which decoders pass: behind the first frame's last block."""
    second = gif.rindex(b"\x21\xf9\x04", 0, gif.rindex(b"\x21\xf9\x04"))
    return gif[:second] + bytes(3) + gif[second:]


CASES = {
    "still GIF": ("gif", saved("GIF", 1), False),
    "moving GIF": ("gif", saved("GIF", 3), True),
    "moving GIF with stray bytes": ("gif", with_stray_bytes(saved("GIF", 3, duration=50)), True),
    "moving GIF named .png": ("png", saved("GIF", 2), True),
    "still WebP": ("webp", saved("WEBP", 1), False),
    "moving WebP": ("webp", saved("WEBP", 3), True),
    "animation of one frame": ("webp", one_frame_webp(), False),
    "APNG": ("png", saved("PNG", 3), False),
    "MPO": ("jpg", saved("MPO", 2), False),
    "JPEG named .gif": ("gif", saved("JPEG", 1), False),
    "BMP": ("bmp", saved("BMP", 1), False),
}


@pytest.mark.parametrize("name", CASES)
def test_one_answer(name, write_tar):
    extension, media, expected = CASES[name]
    assert is_clip(extension, media) == expected
    path = write_tar([(f"a.{extension}", media), ("a.json", json.dumps({"caption": "x"}).encode())])
    assert build_index(path, "shard").is_clip.tolist() == [expected]
    kind = "video_text" if expected else "image_text"
    config = DataEntryConfig(f"pipe:cat {path}", kind)
    stream = StreamReader(config, key="k", seed=0, buffer=1, reader=0, readers=1, first_shard=0)
    sample = stream.next()
    assert sample.media == media
    assert moves(sample) == expected
    assert (media_facts(sample).frames is not None) == expected
    assert examine(media, extension, "list:1", "full") == ("video" if expected else "image")
    assert picture_size(media) == (120, 100)


def test_one_frame_of_a_clip_is_the_middle_one_and_a_picture_is_itself():
    config = LoaderConfig()
    for name in ("still GIF", "animation of one frame", "JPEG named .gif", "moving GIF named .png", "moving WebP"):
        extension, media, expected = CASES[name]
        shown = evaluation_frames(Sample("k", "s", media, extension), 50, 1, config).double().mean()
        shade = SHADES[1 if expected else 0] if name != "moving GIF named .png" else SHADES[1]
        assert abs(float(shown) - shade / 2) < 15, name
