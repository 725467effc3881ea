"""Tensors in files: their values, and what is said where there is no room."""

import errno
import os
from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.hosts.zero.mapped import MappedFiles


def test_a_copy_lies_in_a_file_that_has_no_name_any_more(tmp_path: Path) -> None:
    wanted = torch.arange(10_000, dtype=torch.float32)
    copied = MappedFiles(tmp_path / "states").copy_of(wanted)
    assert torch.equal(copied, wanted)
    copied.add_(1)
    assert torch.equal(copied, wanted + 1)
    assert list((tmp_path / "states").iterdir()) == []
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(maps) == 1
    assert maps[0].endswith("(deleted)")
    del copied
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_an_empty_share_needs_no_file(tmp_path: Path) -> None:
    assert MappedFiles(tmp_path / "states").zeros_like(torch.zeros(0)).shape == (0,)
    assert not (tmp_path / "states").exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        assert length == 4_000_000
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlanError) as error:
        MappedFiles(tmp_path).zeros_like(torch.zeros(1_000_000))
    assert str(error.value) == (
        f"parallel.nvme_folder: got {str(tmp_path)!r}, which does not take 1 M elements (No space left on device); "
        "allowed a folder with room on each machine; name another one"
    )
    assert list(tmp_path.iterdir()) == []
