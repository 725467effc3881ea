"""Rows of Kinetics that name a whole video get their own seconds of it."""

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest

from omnivl.data.convert import ConvertOptions, KineticsReader, convert
from omnivl.data.decode import decode_clip
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import Sample

RATE = 10


def video(path: Path, seconds: int, codec: str = "libx264", gop: int = 250, side: int = 32) -> None:
    """Ten frames a second; in second n the picture has brightness 10 + 15 n, and one more in each frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"crf": "4"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = side, side, "yuv420p", gop
        for number in range(seconds * RATE):
            pixels = np.full((side, side, 3), 10 + 15 * (number // RATE) + number % RATE, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def converted(tmp_path: Path, rows: str, **options: object) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """The clips by key, and the rejections."""
    table = tmp_path / "list.csv"
    table.write_text("label,youtube_id,time_start,time_end\n" + rows)
    convert(KineticsReader(table, tmp_path / "clips"), tmp_path / "out", ConvertOptions(**options))
    with tarfile.open(tmp_path / "out" / "data-000000.tar") as tar:
        media = {
            member.name.partition(".")[0]: tar.extractfile(member).read()
            for member in tar
            if ".json" not in member.name
        }
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    return media, [json.loads(line) for line in lines]


def brightness(media: bytes) -> list[float]:
    pixels = decode_clip(Sample("k", "s", media, "mp4"), DecodeLimits(), range)
    return pixels.mean(axis=(1, 2, 3)).tolist()


def expected(first: float, last: float) -> list[float]:
    numbers = range(round(first * RATE), round(last * RATE))
    return [10 + 15 * (number // RATE) + number % RATE for number in numbers]


@pytest.mark.parametrize(
    ("suffix", "codec", "gop"),
    [("mp4", "libx264", 250), ("mp4", "libx264", 7), ("webm", "libvpx", 30), ("ts", "mpeg2video", 12)],
)
@pytest.mark.parametrize("options", [{}, {"shorter_side": 16, "verify": "full"}])
def test_each_row_holds_its_own_seconds(tmp_path, suffix, codec, gop, options):
    video(tmp_path / "clips" / f"abc.{suffix}", 12, codec, gop)
    if suffix == "ts":
        (tmp_path / "clips" / "abc.ts").rename(tmp_path / "clips" / "abc.mpg")
    media, rejected = converted(tmp_path, "a,abc,2,4\nb,abc,7.5,9\nc,abc,11,15\nd,abc,30,40\n", **options)
    spans = {"abc_000002_000004": (2, 4), "abc_000008_000009": (7.5, 9), "abc_000011_000015": (11, 12)}
    assert set(media) == set(spans)
    for key, span in spans.items():
        assert brightness(media[key]) == pytest.approx(expected(*span), abs=3)
    assert [(one["cause"], one["where"].rpartition(":")[2]) for one in rejected] == [("broken_video", "5")]
    assert rejected[0]["detail"] == "no frame between the seconds 30 and 40: the clip is shorter"


def test_what_is_cut_already_is_copied(tmp_path):
    video(tmp_path / "clips" / "one_000100_000103.mp4", 3)
    video(tmp_path / "clips" / "two.mp4", 3)
    video(tmp_path / "clips" / "long.mp4", 8)
    media, rejected = converted(tmp_path, "a,one,100,103\na,two,50,53\na,long,1,3\na,bad,3,1\na,bad,nan,1\n")
    folder = tmp_path / "clips"
    assert media["one_000100_000103"] == (folder / "one_000100_000103.mp4").read_bytes()
    assert media["two_000050_000053"] == (folder / "two.mp4").read_bytes()
    assert brightness(media["long_000001_000003"]) == pytest.approx(expected(1, 3), abs=3)
    assert [one["detail"] for one in rejected] == [
        "time_start '3' and time_end '1' are no span of seconds; mend the row",
        "time_start 'nan' and time_end '1' are no span of seconds; mend the row",
    ]
    with av.open(io.BytesIO(media["long_000001_000003"])) as container:
        assert container.streams.audio == ()
