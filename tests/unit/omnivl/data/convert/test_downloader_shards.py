"""Shards as img2dataset and video2dataset write them are read without conversion."""

import json
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources import open_source


def open_folder(folder: Path, kind: str):
    return open_source(DataEntryConfig(source=str(folder), kind=kind), seed=0)


def write_shard(path: Path, samples: list[dict[str, object]]) -> None:
    with TarWriter(str(path), encoder=False) as tar:
        for sample in samples:
            tar.write(sample)


def test_img2dataset(tmp_path, make_image):
    first, second = make_image(tmp_path / "a.jpg"), make_image(tmp_path / "b.jpg", seed=1)

    def described(key: str, caption: str | None) -> bytes:
        fields = {
            "caption": caption,
            "url": "https://example.org/a.jpg",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 12,
            "height": 10,
            "original_width": 640,
            "original_height": 480,
            "exif": "{}",
            "sha256": "00",
        }
        return json.dumps(fields, indent=4).encode()

    write_shard(
        tmp_path / "00000.tar",
        [
            {"__key__": "000000000", "jpg": first, "json": described("000000000", "from both"), "txt": b"from both"},
            {"__key__": "000000001", "jpg": second, "json": described("000000001", None), "txt": b"from the text file"},
            {"__key__": "000000002", "jpg": second, "txt": "größer".encode()},
            {"__key__": "000000003", "jpg": second, "json": described("000000003", None)},
        ],
    )
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    source = open_folder(tmp_path, "image_text")
    samples = [source.read(index) for index in range(len(source))]
    assert [sample.captions for sample in samples] == [("from both",), ("from the text file",), ("größer",)]
    assert [sample.media for sample in samples] == [first, second, second]
    assert samples[0].meta["original_width"] == 640
    assert [(entry.cause, entry.where) for entry in source.rejections] == [
        ("missing_caption", f"{tmp_path}/00000.tar:000000003")
    ]


@pytest.mark.parametrize("with_sound", [False, True])
def test_video2dataset(tmp_path, make_video, with_sound):
    clip = make_video(tmp_path / "clip.mp4")
    fields = {
        "url": "https://example.org/watch",
        "videoID": "x",
        "key": "000000000_00000",
        "status": "success",
        "error_message": None,
        "caption": "a dog runs",
        "yt_meta_dict": None,
        "clips": [[1.0, 2.5]],
        "video_metadata": {"streams": []},
    }
    sample = {"__key__": "000000000_00000", "mp4": clip, "json": json.dumps(fields).encode(), "txt": b"a dog runs"}
    if with_sound:
        sample["m4a"] = b"sound"
    write_shard(tmp_path / "00000.tar", [sample])
    source = open_folder(tmp_path, "video_text")
    read = source.read(0)
    assert (len(source), read.captions, read.media, read.extension) == (1, ("a dog runs",), clip, "mp4")
    assert read.meta["clips"] == [[1.0, 2.5]]
    assert not source.rejections
