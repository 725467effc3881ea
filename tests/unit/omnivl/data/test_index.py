import io
import json
import os
from pathlib import Path

import media_files
import numpy as np
import pytest
from PIL import Image

from omnivl.data.archive import split_name
from omnivl.data.decode import decode_still
from omnivl.data.index import build_index
from omnivl.data.index_file import load_index
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import Sample


def causes(path: Path) -> list[str]:
    return [rejection.cause for rejection in build_index(path, "s").rejections]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a.b/0001.seg.PNG", ("a.b/0001", "seg.png")),
        ("folder/plain", ("folder/plain", "")),
    ],
)
def test_split_name_cuts_at_the_first_dot_of_the_base_name(name, expected):
    assert split_name(name) == expected


def test_offsets_point_at_the_bytes(write_tar, png):
    path = write_tar([("a.png", png), ("a.json", b'{"caption": "x"}'), ("b.txt", b"y"), ("b.png", png + b"tail")])
    index = build_index(path, "s")
    data = path.read_bytes()
    assert index.keys == ("a", "b")
    (offset, size), (second, second_size) = index.media.tolist()
    assert data[offset : offset + size] == png
    assert data[second : second + second_size] == png + b"tail"
    json_span, txt_span, cls_span = index.text[0].tolist()
    assert data[json_span[0] : sum(json_span)] == b'{"caption": "x"}'
    assert txt_span == cls_span == [0, -1]
    assert index.rejections == ()


def test_sizes_are_those_of_the_decoded_picture(write_tar, tmp_path):
    turned = [(f"turned-{value}", "jpg", media_files.oriented("JPEG", value)) for value in (1, 3, 6, 8)]
    far = turned[2][2]
    far = far[:2] + b"\xff\xe5" + (60_000).to_bytes(2, "big") + bytes(59_998) + far[2:]  # before EXIF and size
    given = [*media_files.pictures(), *turned, ("far", "jpg", far)]
    members = [(f"{number:03d}.{extension}", data) for number, (_, extension, data) in enumerate(given)]
    path = write_tar(members)
    index = build_index(path, "s")
    assert index.rejections == ()
    for (name, extension, data), size in zip(given, index.sizes.tolist(), strict=True):
        pixels = decode_still(Sample("k", "w", data, extension), DecodeLimits())
        assert size == [pixels.shape[2], pixels.shape[1]], name
    assert index.sizes.tolist() == load_index(path, "s", tmp_path / "kept").sizes.tolist()
    assert load_index(path, "s", tmp_path / "kept").sizes.tolist() == index.sizes.tolist()  # now from the file
    keep = np.arange(len(index)) % 2 == 0
    assert index.only(keep).sizes.tolist() == index.sizes[keep].tolist()


def test_the_size_of_a_clip_is_what_its_text_says(write_tar):
    clip = media_files.clip()
    texts = [{"width": 66, "height": 48}, {"width": 66}, {"width": "66", "height": 48}, {"width": 0, "height": 5}, {}]
    texts.append({"width": 2**31, "height": 1})
    members = []
    for number, text in enumerate(texts):
        members += [(f"{number}.mp4", clip), (f"{number}.json", json.dumps({"caption": "a", **text}).encode())]
    assert build_index(write_tar(members), "s").sizes.tolist() == [[66, 48]] + [[0, 0]] * 5


def huge(form: str) -> bytes:
    """A picture whose header says that it is wider than an index can hold."""
    if form == "png":
        data = media_files.saved("PNG")
        return data[:16] + b"\xff\xff\xff\xff" + data[20:]
    data = media_files.saved("BMP")
    return data[:18] + (-(2**31)).to_bytes(4, "little", signed=True) + data[22:]


@pytest.mark.parametrize("form", ["png", "bmp"])
def test_a_size_that_cannot_be_held_is_not_known(write_tar, form):
    good = media_files.saved("PNG")
    index = build_index(write_tar([("0.png", good), (f"1.{form}", huge(form)), ("2.png", good)]), "s")
    assert index.rejections == ()
    assert index.sizes.tolist() == [[66, 48], [0, 0], [66, 48]]


def large_jpeg(before: int, between: int = 0, after: int = 0) -> bytes:
    """A turned JPEG of 600 x 400 pixels, with bytes before its EXIF, between EXIF and size, and behind its size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", exif=exif, quality=95)
    data = file.getvalue()

    def padding(count: int) -> bytes:
        return b"\xff\xe5" + (count + 2).to_bytes(2, "big") + bytes(count) if count else b""

    exif_end = data.index(b"Exif") + int.from_bytes(data[data.index(b"Exif") - 2 : data.index(b"Exif")], "big") - 2
    size = data.index(b"\xff\xc0")
    size_end = size + 2 + int.from_bytes(data[size + 2 : size + 4], "big")
    parts = data[:2], padding(before), data[2:exif_end], padding(between), data[exif_end:size_end], padding(after)
    return b"".join((*parts, data[size_end:]))


@pytest.mark.parametrize(
    ("padding", "most"),
    [
        ((0,), 1024),
        ((3000,), 1024 + 65_536),
        ((0, 3000), 1024 + 65_536),
        ((0, 0, 600), 1024 + 65_536),  # the size is in the first bytes, the scan is not
    ],
)
def test_of_a_large_turned_jpeg_no_more_is_read_than_its_header(write_tar, monkeypatch, padding, most):
    data = large_jpeg(*padding)
    assert len(data) > 200_000
    path, read = write_tar([("0.jpg", data)]), []
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        found = pread(descriptor, count, offset)
        read.append(len(found))
        return found

    monkeypatch.setattr("omnivl.data.index.os.pread", counted)
    assert build_index(path, "s").sizes.tolist() == [[400, 600]]
    assert sum(read) <= most + 16_384  # headers of the tar, and the 64 bytes that tell clips from pictures


def test_the_scan_of_a_preview_is_not_that_of_the_picture(write_tar):
    """A preview in the EXIF has a scan of its own; the header goes on behind it."""
    data, preview = large_jpeg(0), media_files.saved("JPEG", quality=20)[:600]
    preview += b"\xff\xda" + bytes(20)
    block = b"\xff\xe5" + (len(preview) + 2).to_bytes(2, "big") + preview
    for moved in (data[:2] + block + data[2:], large_jpeg(0, 0, 600)[:2] + block + large_jpeg(0, 0, 600)[2:]):
        assert build_index(write_tar([("0.jpg", moved)]), "s").sizes.tolist() == [[400, 600]]


def test_further_files_are_found_by_name(write_tar, png):
    members = [
        *(("a.left.png", png), ("a.right.PNG", b"other"), ("a.json", b'{"caption": "x"}'), ("b.png", png)),
        *(
            ("b.json", b'{"caption": "y"}'),
            ("b.mask.png", b"m"),
            ("b.sound.m4a", b"s"),
            ("c.json", b'{"caption": "z"}'),
        ),
    ]
    path = write_tar(members)
    index = build_index(path, "s")
    data = path.read_bytes()
    assert index.member_names == ("left.png", "right.png", "mask.png")
    assert index.has_member("right.png").tolist() == [True, False, False]
    assert index.has_member("mask.png").tolist() == [False, True, False]
    assert index.has_member("left").tolist() == [True, False, False]
    assert not index.has_member("other.png").any()
    assert not index.has_member("sound").any()
    spans = index.members_of(0)
    assert [data[offset : offset + size] for offset, size in spans.values()] == [png, b"other"]
    assert list(index.members_of(1)) == ["mask.png"]
    assert index.members_of(2) == {}
    assert index.media[:, 1].tolist() == [-1, len(png), -1]


@pytest.mark.parametrize(
    ("members", "cause", "detail"),
    [
        ([("a.json", b'{"caption": "x"}')], "missing_media", "the sample has only json"),
        ([("a.pyd", b"P"), ("a.json", b"{}")], "unknown_extension", ".pyd is not read; known: avi"),
        ([("a.left.png", b"P"), ("a.json", b"{}")], "unknown_extension", ".left.png is not read; known: avi"),
    ],
)
def test_a_sample_without_a_picture_is_bad_for_those_who_want_one(write_tar, members, cause, detail):
    index = build_index(write_tar(members), "s.tar")
    assert (index.rejections, len(index)) == ((), 1)
    found = index.without_media(0, "s.tar")
    assert (found.cause, found.where) == (cause, "s.tar:a")
    assert detail in found.detail


def test_metadata_is_encoded_by_value(write_tar, png):
    members = []
    for number, split in enumerate(["train", "test", "train"]):
        record = {"caption": "x", "split": split, "tags": ["a", "b"]} if number else {"caption": "x", "split": split}
        members += [(f"{number}.png", png), (f"{number}.json", json.dumps(record).encode())]
    values, codes = build_index(write_tar(members), "s").fields["split"]
    assert [values[code] for code in codes] == ['"train"', '"test"', '"train"']
    values, codes = build_index(write_tar(members), "s").fields["tags"]
    assert codes.tolist() == [-1, 0, 0]
    assert values == ('["a", "b"]',)


@pytest.mark.parametrize(
    ("members", "cause", "detail"),
    [
        ([("a.png", b"P"), ("a.json", b'{"caption": "\xff"}')], "invalid_utf8", "byte 0xff at offset 13 is not UTF-8"),
        ([("a.png", b"P"), ("a.json", b'{"caption": ')], "wrong_json", "Expecting value"),
        ([("a.png", b"P"), ("a.json", b"[1]")], "wrong_json", "the JSON is a list; allowed: an object"),
        ([("a.png", b"P"), ("a.json", b'{"caption": 3}')], "wrong_json", "a caption is 3; allowed: text"),
        ([("a.png", b"P"), ("a.json", b'{"label": [1]}')], "wrong_json", "label is [1]; allowed: a class name"),
        ([("a.png", b"P"), ("a.jpg", b"P")], "duplicate_key", "two members for .jpg"),
        ([("a.png", b"P"), ("b.png", b"P"), ("a.jpg", b"P")], "duplicate_key", "an earlier sample"),
    ],
)
def test_bad_samples_are_named_by_cause(write_tar, members, cause, detail):
    index = build_index(write_tar(members), "s.tar")
    assert [rejection.cause for rejection in index.rejections] == [cause]
    assert index.rejections[0].where == "s.tar:a"
    assert detail in index.rejections[0].detail


def test_empty_shards(write_tar, tmp_path):
    assert causes(write_tar([])) == ["empty_shard"]
    (tmp_path / "nothing.tar").touch()
    assert causes(tmp_path / "nothing.tar") == ["empty_shard"]


def test_a_missing_shard_is_unreadable(tmp_path):
    assert causes(tmp_path / "absent.tar") == ["unreadable_path"]


@pytest.mark.parametrize("cut", [100, 700, 2600, 3100])
def test_a_truncated_tar_keeps_what_is_whole(write_tar, pairs, cut):
    # Members are 512 bytes of header and 512 of data: a sample takes 2048. A cut at 2600 is in the third header,
    # at 3100 in the third member's data.
    path = write_tar(pairs(4))
    with path.open("r+b") as file:
        file.truncate(cut)
    index = build_index(path, "s")
    assert [rejection.cause for rejection in index.rejections] == ["truncated_tar"]
    assert len(index) == (1 if cut >= 2048 else 0)


def test_a_file_that_is_no_tar(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"no tar at all" * 100)
    assert causes(path) == ["wrong_archive"]


def test_the_cache_is_used_and_follows_the_shard(write_tar, pairs, tmp_path):
    path, cache = write_tar(pairs(3, split="train")), tmp_path / "deep" / "index.safetensors"
    first = load_index(path, "s", cache)
    again = load_index(path, "s", cache)
    assert cache.exists()
    assert again.keys == first.keys
    assert np.array_equal(again.media, first.media)
    assert np.array_equal(again.text, first.text)
    assert again.fields["split"][0] == first.fields["split"][0]
    assert list(cache.parent.glob(".*")) == [], "no temporary file stays"
    write_tar(pairs(5))
    assert len(load_index(path, "s", cache)) == 5


def test_a_change_of_time_alone_invalidates(write_tar, pairs, tmp_path):
    path, cache = write_tar(pairs(2)), tmp_path / "index.safetensors"
    load_index(path, "s", cache)
    before = cache.stat().st_mtime_ns
    os.utime(path, ns=(1, 1))
    os.utime(cache, ns=(before - 10**9, before - 10**9))
    load_index(path, "s", cache)
    assert cache.stat().st_mtime_ns > before - 10**9


def test_a_broken_cache_is_built_anew(write_tar, pairs, tmp_path):
    path, cache = write_tar(pairs(2)), tmp_path / "index.safetensors"
    cache.write_bytes(b"PK\x03\x04 torn")
    assert len(load_index(path, "s", cache)) == 2


def test_a_cache_that_cannot_be_written_is_no_error(write_tar, pairs, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    assert len(load_index(write_tar(pairs(2)), "s", blocked / "index.safetensors")) == 2
