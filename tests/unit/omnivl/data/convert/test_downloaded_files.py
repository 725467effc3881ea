"""Folders as img2dataset and video2dataset write them with ``--output_format files``."""

import json
from pathlib import Path

import pytest

from omnivl.data.convert import ConvertOptions, FolderReader, convert
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError


@pytest.fixture
def downloaded(tmp_path, make_image):
    root = tmp_path / "files"
    for number in range(3):
        make_image(root / "00000" / f"{number:09d}.jpg", seed=number)
        described = {"caption": f"thing {number}", "url": "u", "key": f"{number:09d}", "status": "success", "width": 12}
        (root / "00000" / f"{number:09d}.json").write_text(json.dumps(described))
        (root / "00000" / f"{number:09d}.txt").write_text(f"thing {number}")
    (root / "00000" / "000000002.txt").unlink()
    (root / "00000_stats.json").write_text("{}")
    (root / "00000.parquet").write_bytes(b"PAR1")
    return root


def test_they_are_converted_whole(downloaded, tmp_path):
    manifest = convert(FolderReader(downloaded, "caption"), tmp_path / "out", ConvertOptions())
    assert (manifest.samples, manifest.captions, dict(manifest.rejected)) == (3, 3, {})
    entries = list(FolderReader(downloaded, "caption").entries())
    assert [entry.captions for entry in entries] == [("thing 0",), ("thing 1",), ("thing 2",)]
    assert entries[0].meta == {"url": "u", "key": "000000000", "status": "success", "width": 12}


@pytest.mark.parametrize("text", ["label", "both"])
def test_their_numbers_are_no_classes(downloaded, text):
    with pytest.raises(DataError, match=r"its sub-folders are numbers, not classes; give --text caption"):
        list(FolderReader(downloaded, text).entries())


def test_a_damaged_json_beside_a_picture_is_named(downloaded):
    (downloaded / "00000" / "000000001.json").write_text("{")
    bad = [entry for entry in FolderReader(downloaded, "caption").entries() if isinstance(entry, Rejection)]
    assert [(entry.cause, Path(entry.where).name) for entry in bad] == [("wrong_json", "000000001.json")]


def test_classes_of_numbers_stay_classes(tmp_path, make_image):
    for number in range(2):
        make_image(tmp_path / "in" / f"{number:05d}" / "a.jpg", seed=number)
    assert [entry.label for entry in FolderReader(tmp_path / "in").entries()] == ["00000", "00001"]


def test_a_json_that_belongs_to_no_picture_is_named(tmp_path, make_image):
    make_image(tmp_path / "in" / "cat" / "a.jpg")
    (tmp_path / "in" / "cat" / "other.json").write_text("{}")
    causes = [entry.cause for entry in FolderReader(tmp_path / "in").entries() if isinstance(entry, Rejection)]
    manifest = convert(FolderReader(tmp_path / "in"), tmp_path / "out", ConvertOptions())
    assert causes == []
    assert dict(manifest.rejected) == {"unknown_extension": 1}


def test_captions_beside_pictures_that_lie_in_no_class(tmp_path, make_image):
    make_image(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a word")
    (first, *_) = FolderReader(tmp_path).entries()
    assert first.detail == (
        "lies in no class's folder; move it to ROOT/CLASS/, or take the .txt beside each picture as its caption "
        "(--text caption)"
    )


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"shard\.tar is no folder; give the folder that holds the pictures or clips"):
        list(FolderReader(tmp_path / "shard.tar").entries())
