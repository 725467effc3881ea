"""Runs of tensors in files, one for each machine, without a host."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.hosts import shards, shared_file
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.shards import KeptMemory, Piece, Records, Shard, make_shard, share
from engine.hosts.shared_file import Part, place_among
from engine.processes.files import damaged_ranges, write_ranges, write_synced

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
    index = {"steps": 3, "tensors": {key: tensor.shape for key, tensor in tensors.items()}}
    shards = [
        make_shard(number, share(pieces(tensors), number, copies), index if number == 0 else None)
        for number in range(copies)
    ]
    return [replace(shard, state=b'{"number": %d}' % shard.number) for shard in shards]


def write(shards: list[Shard], folder: Path, machines: str) -> list[Records]:
    """Writes shards of processes, each of which runs on the machine of that letter; the last process is first."""
    parts = [shard.part(name) for shard, name in zip(shards, machines, strict=True)]
    written = [shard.write(folder, place_among(parts, shard.number)) for shard in reversed(shards)]
    return written[::-1]


@pytest.mark.parametrize("machines", ["a", "aa", "aab", "aba", "abb", "abc", "a" * 100, "aabbbcb"])
def test_any_number_of_shards_holds_every_element_once(tmp_path: Path, machines: str) -> None:
    copies, files = len(machines), len(set(machines))
    written = shards_of(TENSORS, copies)
    write(written, tmp_path, machines)
    names = [f"shard-{number:05d}.safetensors" for number in range(files)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", *names]
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
    assert [saved.state(number) for number in range(copies)] == [{"number": number} for number in range(copies)]


def test_a_lone_process_writes_tensors_that_anything_reads(tmp_path: Path) -> None:
    (records,) = write(shards_of(TENSORS, 1), tmp_path, "a")
    found = load_file(tmp_path / "shard-00000.safetensors")
    assert bytes(found.pop("process/00000").tolist()).strip() == b'{"number": 0}'
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) and found[key].shape == tensor.shape for key, tensor in TENSORS.items())
    for name, ranges in records.items():
        assert not list(damaged_ranges(tmp_path / name, ranges, range(len(ranges))))
        assert sum(record["bytes"] for record in ranges) == (tmp_path / name).stat().st_size
    assert sorted(records) == sorted(path.name for path in tmp_path.iterdir())


def test_processes_of_a_machine_write_one_file_that_anything_reads(tmp_path: Path) -> None:
    write(shards_of(TENSORS, 3), tmp_path, "aba")
    # 83 elements in the order of TENSORS: process 0 has 0 to 26, process 1 up to 54, process 2 the rest. They take 108,
    # 89 and 112 bytes; 13 bytes of state behind them are padded to 128, 104 and 128.
    assert safe_keys(tmp_path / "shard-00000.safetensors") == {
        **{"weight/a.matrix[0:27]": [27], "process/00000": [20], "exp_avg/a.matrix[7:35]": [28], "process/00002": [16]},
    }
    assert safe_keys(tmp_path / "shard-00001.safetensors") == {
        **{"weight/a.matrix[27:35]": [8], "weight/a.half": [9], "weight/a.valid": [3], "weight/a.cursor": []},
        **{"exp_avg/a.matrix[0:7]": [7], "process/00001": [15]},
    }
    found = load_file(tmp_path / "shard-00000.safetensors")
    assert torch.equal(found["exp_avg/a.matrix[7:35]"], torch.arange(7, 35) / 64)
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())


def safe_keys(file: Path) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in load_file(file).items()}


def test_a_header_does_not_become_longer_than_safetensors_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine has one more file instead; the first one is not filled up later."""
    monkeypatch.setattr(shared_file, "_LONGEST", 100)
    parts = [Part(machine, head, 8) for machine, head in zip("aabaaac", (40, 60, 40, 8, 88, 16, 120), strict=True)]
    places = [place_among(parts, process) for process in range(7)]
    assert [place.shard for place in places] == places[0].shards == [0, 0, 1, 2, 2, 3, 4]
    assert [place.head for place in places] == [8, 48, 8, 8, 16, 8, 8]
    assert [place.header_end for place in places] == [108, 108, 48, 104, 104, 24, 128]
    assert [place.end for place in places] == [124, 124, 56, 120, 120, 32, 136]
    assert [place.is_last for place in places] == [False, True, True, False, True, True, True]


def test_what_lay_in_the_place_of_a_file_leaves_no_trace(tmp_path: Path) -> None:
    """An earlier try has left a longer file."""
    for name in ("clean", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "shard-00000.safetensors").write_bytes(b"x" * 100_000)
    for name in ("clean", "used"):
        write(shards_of(TENSORS, 3), tmp_path / name, "aab")
    clean, used = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("clean", "used"))
    assert clean == used


def test_no_other_file_is_opened_where_that_of_the_own_machine_is_enough(tmp_path: Path) -> None:
    write(shards_of(TENSORS, 4), tmp_path, "abbc")
    for number in (0, 2):
        (tmp_path / f"shard-{number:05d}.safetensors").write_bytes(b"torn")
    saved = SavedTensors(tmp_path, first=2)
    assert torch.equal(saved.read("weight/a.matrix", 30, 3), torch.arange(30.0, 33.0))
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: got a file that is no shard or is truncated"):
        saved.whole("weight/a.matrix")
    with pytest.raises(CheckpointError, match=r"shard-00002\.safetensors: got a file that is no shard or is truncated"):
        saved.state(3)


def test_what_each_process_wrote_alone_is_read(tmp_path: Path) -> None:
    """The layout of format 2: where runs begin stands in the metadata, and the index has the number of files."""
    for shard in shards_of(TENSORS, 3):
        runs = {piece.key: piece.start for piece in shard.pieces if not piece.is_whole}
        held = {piece.key: piece.held.view(piece.shape) if piece.is_whole else piece.held for piece in shard.pieces}
        file = tmp_path / f"shard-{shard.number:05d}.safetensors"
        save_file({key: tensor.clone() for key, tensor in held.items()}, file, {"runs": json.dumps(runs)})
    shapes = {key: list(tensor.shape) for key, tensor in TENSORS.items()}
    (tmp_path / "index.json").write_text(json.dumps({"steps": 3, "shards": 3, "tensors": shapes}))
    saved = SavedTensors(tmp_path, first=1)
    assert all(torch.equal(saved.whole(key), tensor) for key, tensor in TENSORS.items())


def test_missing_elements_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        SavedTensors(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'index.json'}: not found; allowed is a folder that a host saved, an index with its shards"
    )
    write(shards_of(TENSORS, 2), tmp_path, "ab")
    index = json.loads((tmp_path / "index.json").read_bytes())
    assert index["shards"] == [0, 1]
    (tmp_path / "index.json").write_text(json.dumps({**index, "shards": [0]}))
    with pytest.raises(CheckpointError, match=r"the shards hold 0 of 35 elements of exp_avg/a\.matrix"):
        SavedTensors(tmp_path).whole("exp_avg/a.matrix")


def test_a_kept_shard_does_not_follow_its_tensors_and_keeps_its_place(tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
    (shard,) = shards_of(tensors, 1)
    memory = KeptMemory()
    kept = shard.kept(memory)
    for tensor in tensors.values():
        tensor.zero_()
    write([kept], tmp_path, "a")
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


def test_ranges_of_a_file_are_hashed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers, the second one first; then every byte is changed in turn."""
    monkeypatch.setattr("engine.processes.files._CHUNK", 3)
    file = tmp_path / "file"
    behind = write_ranges(file, [(4, [b"four"]), (10, [b"ten", b"", b" to", b" the end"])], None)
    before = write_ranges(file, [(0, [b"zero"]), (8, [b"-8"])], 24)
    content = b"zerofour-8ten to the end"
    assert file.read_bytes() == content
    records = [record for pair in zip(before, behind, strict=True) for record in pair]
    assert [record["bytes"] for record in records] == [4, 4, 2, 14]
    assert not list(damaged_ranges(file, records, range(4)))
    damaged = [0] * 4 + [1] * 4 + [2] * 2 + [3] * 14
    for place, expected in enumerate(damaged):
        file.write_bytes(content[:place] + b"?" + content[place + 1 :])
        assert list(damaged_ranges(file, records, range(4))) == [expected], place
        assert list(damaged_ranges(file, records, [1, 3])) == [one for one in (1, 3) if one == expected], place
    file.write_bytes(content[:-1])
    assert list(damaged_ranges(file, records, range(4))) == [3]
