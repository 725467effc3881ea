"""Runs of tensors in files, one for each process, without a host."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.hosts import shards
from engine.hosts.shards import KeptMemory, Piece, SavedTensors, Shard, make_shard, share
from engine.processes.files import write_synced

TENSORS = {
    "weight/a.matrix": torch.arange(35, dtype=torch.float32).view(5, 7),
    "weight/a.half": torch.arange(9, dtype=torch.bfloat16),
    "weight/a.valid": torch.tensor([True, False, True]),
    "weight/a.cursor": torch.tensor(7),
    "exp_avg/a.matrix": torch.arange(35, dtype=torch.float32).view(5, 7) / 64,
}


def pieces(tensors: dict[str, Tensor]) -> list[Piece]:
    return [Piece(key, tuple(tensor.shape), 0, tensor.view(-1)) for key, tensor in tensors.items()]


def shards_of(tensors: dict[str, Tensor], copies: int) -> list[Shard]:
    index = {"steps": 3, "shards": copies, "tensors": {key: tensor.shape for key, tensor in tensors.items()}}
    return [
        make_shard(number, share(pieces(tensors), number, copies), index if number == 0 else None)
        for number in range(copies)
    ]


@pytest.mark.parametrize("copies", [1, 2, 3, 100])
def test_any_number_of_shards_holds_every_element_once(tmp_path: Path, copies: int) -> None:
    written = shards_of(TENSORS, copies)
    for shard in written:
        shard.write(tmp_path)
    counts = [sum(piece.held.numel() for piece in shard.pieces) for shard in written]
    assert sum(counts) == 35 + 9 + 3 + 1 + 35
    assert max(counts) - min(counts) <= 1
    saved = SavedTensors(tmp_path, first=copies - 1)
    assert saved.steps == 3
    for key, tensor in TENSORS.items():
        assert saved.whole(key).dtype == tensor.dtype
        assert torch.equal(saved.whole(key), tensor), key
    assert torch.equal(saved.read("weight/a.matrix", 11, 13), torch.arange(11.0, 24.0))
    assert saved.read("weight/a.matrix", 35, 0).numel() == 0


def test_a_lone_process_writes_tensors_that_anything_reads(tmp_path: Path) -> None:
    (shard,) = shards_of(TENSORS, 1)
    records = shard.write(tmp_path)
    found = load_file(tmp_path / "shard-00000.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) and found[key].shape == tensor.shape for key, tensor in TENSORS.items())
    for name, record in records.items():
        content = (tmp_path / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert sorted(records) == sorted(path.name for path in tmp_path.iterdir())


def test_no_other_shard_is_opened_where_the_own_one_is_enough(tmp_path: Path) -> None:
    for shard in shards_of(TENSORS, 3):
        shard.write(tmp_path)
    for number in (0, 2):
        (tmp_path / f"shard-{number:05d}.safetensors").write_bytes(b"torn")
    saved = SavedTensors(tmp_path, first=1)
    assert torch.equal(saved.read("weight/a.matrix", 30, 3), torch.arange(30.0, 33.0))
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: got a file that is no shard or is truncated"):
        saved.whole("weight/a.matrix")


def test_missing_elements_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        SavedTensors(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'index.json'}: not found; allowed is a folder that a host saved, an index with its shards"
    )
    first, _ = shards_of(TENSORS, 2)
    first.write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_bytes())
    (tmp_path / "index.json").write_text(json.dumps({**index, "shards": 1}))
    with pytest.raises(CheckpointError, match=r"the shards hold 0 of 35 elements of exp_avg/a\.matrix"):
        SavedTensors(tmp_path).whole("exp_avg/a.matrix")


def test_a_kept_shard_does_not_follow_its_tensors_and_keeps_its_place(tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
    (shard,) = shards_of(tensors, 1)
    memory = KeptMemory()
    kept = shard.kept(memory)
    for tensor in tensors.values():
        tensor.zero_()
    kept.write(tmp_path)
    saved = SavedTensors(tmp_path)
    assert all(torch.equal(saved.whole(key), tensor) for key, tensor in TENSORS.items())
    places = [piece.held.data_ptr() for piece in kept.pieces]
    assert [piece.held.data_ptr() for piece in shard.kept(memory).pieces] == places, "nothing is allocated again"


def test_kept_memory_comes_in_blocks_of_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BLOCK", 64)
    sizes = [200, 40, 16, 8, 8, 3]
    views = KeptMemory().take(sizes, pinned=False)
    assert [len(view) for view in views] == sizes
    assert [view.untyped_storage().nbytes() for view in views] == [200, 64, 64, 64, 11, 11]
    for number, view in enumerate(views):
        view.fill_(number)
    assert all(bool((view == number).all()) for number, view in enumerate(views)), "none lies on another"


def test_parts_are_hashed_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.processes.files._CHUNK", 5)
    record = write_synced(tmp_path / "file", [b"twelve bytes", b"", memoryview(b" and more")])
    assert (tmp_path / "file").read_bytes() == b"twelve bytes and more"
    assert record == {"bytes": 21, "sha256": hashlib.sha256(b"twelve bytes and more").hexdigest()}
