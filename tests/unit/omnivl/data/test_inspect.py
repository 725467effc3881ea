"""Counts of a hand-made set of shards, and the page made of them."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tar_files import write_tar

from omnivl.data import inspect as inspect_module
from omnivl.data.inspect import inspect_source, spread
from omnivl.data.inspect_media import MediaFacts, media_facts, thumbnail
from omnivl.data.inspect_page import Bar, bars_of, binned, readable_bytes, render_page
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.errors import DataError


def picture(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def animation(frames: int, milliseconds: int, form: str = "WEBP") -> bytes:
    pictures = [Image.new("RGB", (16, 8), (40 * number, 0, 0)) for number in range(frames)]
    out = io.BytesIO()
    pictures[0].save(out, form, save_all=True, append_images=pictures[1:], duration=milliseconds)
    return out.getvalue()


def clip(frames: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            pixels = np.full((16, 32, 3), 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
    def described(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    first = {
        "a.png": picture(20, 10),
        "a.json": described(captions=["one two", "three"], label="cat", split="train", style="flat"),
        "b.png": picture(20, 10),
        "b.json": described(caption="<script>alert(1)</script>", split="test"),
        "c.png": picture(30, 30),
        "c.json": described(captions={"en": "four five", "de": "vier"}, split="train"),
        "d.png": b"no picture at all",
        "d.json": described(label="dog"),
        "e.png": picture(5, 5),
        "e.json": b"{broken",
    }
    second = {
        "a.mp4": clip(7),
        "a.json": described(label="cat"),
        "f.webp": animation(3, 100),
        "f.txt": b"moves",
    }
    write_tar(tmp_path / "s-0.tar", first)
    write_tar(tmp_path / "s-1.tar", second)
    return tmp_path


def test_counts(shards):
    found = inspect_source(str(shards), samples=4)
    assert [(shard.name, shard.samples, shard.stills, shard.clips, shard.rejected) for shard in found.shards] == [
        ("s-0.tar", 4, 4, 0, 1),
        ("s-1.tar", 2, 0, 2, 0),
    ]
    assert (found.samples, found.counted) == (6, 6)
    assert found.bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert found.kinds == {
        **{"image_text": 3, "image_label": 2, "video_text": 1, "video_label": 1},
        **{"image": 4, "video": 2, "text": 4},
    }
    assert found.field_types == {"split": {"text": 3}, "style": {"text": 1}, "label": {"text": 3}}
    assert found.extensions == {"png": 4, "mp4": 1, "webp": 1}
    assert found.captions == 6
    assert found.languages == {"": 4, "en": 1, "de": 1}
    # "one two", "four five": 2 words; "three", "<script>...", "vier", "moves": 1
    assert found.caption_words == {2: 2, 1: 4}
    assert found.labels == {"cat": 2, "dog": 1}
    assert found.fields == {"split": {"train": 2, "test": 1}, "style": {"flat": 1}}
    assert found.sizes == {"20x10": 2, "30x30": 1, "32x16": 1, "16x8": 1}
    assert found.frames == {7: 1, 3: 1}
    assert found.seconds == {0.7: 1, 0.3: 1}
    assert (found.num_repeated_keys, found.repeated_keys) == (1, {"a": 2})
    assert found.rejected == {"wrong_json": 1, "broken_image": 1}
    assert len(found.shown) == 4
    assert not list(shards.glob("*.npz")), "inspecting leaves nothing behind"
    parsed = json.loads(found.to_json())
    assert (parsed["samples"], parsed["shards"][0]["name"]) == (6, "s-0.tar")


def test_media_is_read_for_some_samples_only(shards):
    found = inspect_source(str(shards), samples=0, scan=2)
    assert found.scanned == 2
    assert found.sizes.total() == 2
    assert found.captions == 6
    assert found.shown == []


def test_page_shows_samples_and_escapes_text(shards):
    page = render_page(inspect_source(str(shards), samples=6))
    assert page.count('<figure class="card">') == 6
    assert page.count('src="data:image/webp;base64,') == 5
    assert "broken" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert 'class="sheet clips"' in page
    assert "http" not in page, "the page loads nothing"


class Drawn:
    """A source that makes its samples: 20 clips of 2 to 5 frames."""

    classes = ()
    rejections = ()

    def __len__(self) -> int:
        return 20

    def read(self, index: int) -> Sample:
        frames = np.full((2 + index % 4, 6, 8, 3), 9 * index, dtype=np.uint8)
        return Sample(
            f"{index}", f"motion:{index}", frames=frames, captions=("it moves left",), meta={"split": "train"}
        )


def test_generated_questions_are_counted_as_pictures_with_a_text():
    found = inspect_source("questions", samples=2, scan=4)
    assert (found.samples, found.counted, found.scanned) == (100_000, 6, 4)
    assert found.captions == 6
    assert dict(found.kinds) == {"image_text": 6, "text": 6, "image": 6}
    assert found.field_types["answers"].total() == 6


def test_generated_source_is_counted_by_what_is_drawn(monkeypatch):
    monkeypatch.setattr(inspect_module, "open_source", lambda config, seed: Drawn())
    found = inspect_source("motion", samples=4, scan=8)
    assert (found.samples, found.scanned, found.shards) == (20, 8, [])
    assert found.counted == len(set(spread(20, 8)) | set(spread(20, 4)))
    assert found.sizes == {"8x6": 8}
    assert set(found.frames) <= {2, 3, 4, 5}
    assert [sample.key for sample in found.shown] == ["2", "7", "12", "17"]
    page = render_page(found)
    assert "generated" in page
    assert page.count('src="data:image/webp;base64,') == 4


def test_sources_that_cannot_be_inspected(tmp_path):
    for source, message in (
        ("pipe:cat x.tar", "a stream cannot be inspected"),
        (str(tmp_path), "no shard matches"),
        (str(tmp_path / "none.tar"), "none.tar (No such file or directory); allowed are tar files that are there"),
    ):
        with pytest.raises(DataError) as caught:
            inspect_source(source)
        assert message in str(caught.value)
    with pytest.raises(DataError, match="samples is -1 and scan 5; allowed: 0 or more"):
        inspect_source("emoji", samples=-1, scan=5)


def test_media_facts():
    def facts(media: bytes, extension: str) -> MediaFacts:
        return media_facts(Sample("k", "s:k", media=media, extension=extension))

    assert facts(picture(12, 7), "png") == MediaFacts(12, 7)
    assert facts(animation(5, 40), "webp") == MediaFacts(16, 8, 5, 0.2)
    assert facts(animation(4, 50, "GIF"), "gif") == MediaFacts(16, 8, 4, 0.2)
    video = facts(clip(6), "mp4")
    assert (video.width, video.height, video.frames) == (32, 16, 6)
    assert video.seconds == pytest.approx(0.6)
    assert str(video) == "32 x 16, 6 frames, 0.6 s"
    drawn = Sample("k", "motion:k", frames=np.zeros((3, 10, 20, 3), np.uint8))
    assert media_facts(drawn) == MediaFacts(20, 10, 3)
    for media, cause in ((b"\x89PNG\r\n\x1a\n", "broken_image"), (b"junk", "broken_video")):
        with pytest.raises(BadSampleError) as caught:
            facts(media, "mp4")
        assert caught.value.rejection.cause == cause


def test_thumbnail_of_a_clip_is_a_strip():
    def size(uri: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size

    # 16 x 8 is scaled to 224 x 112, three frames side by side with gaps of 2
    assert size(thumbnail(Sample("k", "s:k", media=animation(3, 10), extension="webp"))) == (676, 112)
    assert size(thumbnail(Sample("k", "s:k", media=picture(20, 10), extension="png"))) == (448, 224)


def test_bars():
    assert bars_of({"b": 1, "a": 4, "c": 1, "": 2}, limit=3) == (
        Bar("a", 4, 100.0),
        Bar("(none)", 2, 50.0),
        Bar("2 others", 2, 50.0),
    )
    assert binned(Counter({3: 1, 4: 2})) == (Bar("3", 1, 50.0), Bar("4", 2, 100.0))
    # 60 values need a step of 10: 1 -> 2 -> 5 -> 10
    assert [bar.name for bar in binned(Counter({5: 1, 64: 1}))] == ["5 to 9", "60 to 64"]
    assert [bar.name for bar in binned(Counter({0.3: 1, 1.4: 1}))] == ["0.3 to 0.4", "1.4 to 1.5"]
    assert binned(Counter[int]()) == ()


def test_spread_and_bytes():
    assert spread(10, 3) == [1, 5, 8]
    assert spread(2, 5) == [0, 1]
    assert spread(0, 5) == []
    assert [readable_bytes(size) for size in (12, 1500, 10_500_000)] == ["12 bytes", "1.5 kB", "10.5 MB"]
