"""Files of arrays are taken only whole, of bounded size, and from the user whose secret they carry."""

from pathlib import Path

import numpy as np
import pytest

from omnivl.data import signed_file
from omnivl.data.signed_file import read_signed, write_signed

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([7], dtype=np.int64)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "arrays"
    assert write_signed(path, ARRAYS)
    found = read_signed(path, 10_000)
    assert found is not None
    assert sorted(found) == ["a", "b"]
    assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    assert [one.name for one in path.parent.iterdir()] == ["arrays"], "nothing temporary is left"


def test_changed_large_foreign_and_special_files_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "arrays"
    write_signed(path, ARRAYS)
    whole = path.read_bytes()
    assert read_signed(path, len(whole) - 1) is None
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_signed(path, 10_000) is None
    path.write_bytes(whole[:20])
    assert read_signed(path, 10_000) is None
    assert read_signed(tmp_path, 10_000) is None
    assert read_signed(tmp_path / "absent", 10_000) is None
    path.write_bytes(whole)
    assert read_signed(path, 10_000) is not None
    monkeypatch.setattr(signed_file, "index_secret", lambda: b"of somebody else")
    assert read_signed(path, 10_000) is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not write_signed(tmp_path / "file" / "arrays", ARRAYS)
