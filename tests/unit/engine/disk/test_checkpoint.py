import dataclasses
import hashlib
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import patience
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.disk.checkpoint import (
    SavedLayout,
    TrainerState,
    checkpoint_steps,
    find_fault,
    load_checkpoint,
    newest_complete,
    prune,
    remove_leftovers,
    step_folder,
)
from engine.disk.checkpoint_writer import CheckpointWriter
from engine.errors import CheckpointError
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.shards import Piece, Records, Shard, make_shard
from engine.hosts.shared_file import Place

SHARD = "shard-00000.safetensors"
LAYOUT = SavedLayout("plain", None, 1, 1, 8)
STATE = TrainerState(
    step=3,
    skipped=1,
    skipped_in_a_row=0,
    best=0.1 + 0.2,
    best_step=2,
    best_of="highest retrieval/image->text R@1",
    metrics_bytes=17,
    window={"losses": {"mlm": [0.1, 3]}},
    layout=LAYOUT,
)


class NumberHost:
    """A host whose state is one tensor of equal numbers."""

    def __init__(self, value: int) -> None:
        self.value = value

    def shard(self) -> Shard:
        piece = Piece("weight/value", (100,), 0, torch.full([100], self.value))
        return make_shard(0, [piece], {"steps": 1, "tensors": {"weight/value": [100]}})

    def load(self, folder: Path) -> None:
        self.value = int(SavedTensors(folder).whole("weight/value")[99])


def special(kind: type[Shard], value: int) -> NumberHost:
    """A host whose shard is written in another way."""

    class SpecialHost(NumberHost):
        def shard(self) -> Shard:
            shard = super().shard()
            return kind(shard.number, shard.pieces, shard.index)

    return SpecialHost(value)


def save(folder: Path, step: int = 3, value: int = 7) -> Path:
    state = dataclasses.replace(STATE, step=step)
    return write(folder, NumberHost(value), state, {"micro_step": 2 * step})


def write(folder: Path, host: NumberHost, state: TrainerState, loader_state: dict[str, Any]) -> Path:
    writer = CheckpointWriter(folder, asynchronous=False, keep_last=9)
    writer.save(host, state, loader_state)  # type: ignore[arg-type]
    return step_folder(folder, state.step)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    checkpoint = save(tmp_path)
    assert checkpoint == tmp_path / "step-000003"
    assert find_fault(checkpoint) is None
    assert not list(tmp_path.glob("*.tmp"))
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    host = NumberHost(0)
    state, loader_state = load_checkpoint(checkpoint, host, LAYOUT, pytest.fail)  # type: ignore[arg-type]
    assert (state, loader_state, host.value) == (STATE, {"micro_step": 6}, 7)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]


def test_manifest_names_every_file(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {file.relative_to(checkpoint).as_posix(): file for file in checkpoint.rglob("*") if file.is_file()}
    assert sorted(files) == ["host/index.json", f"host/{SHARD}", "manifest.json", "trainer.json"]
    assert list(manifest["files"]) == ["host/index.json", f"host/{SHARD}", "trainer.json"]
    for name, ranges in manifest["files"].items():
        content = files[name].read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        expected = [content[:header], content[header:]] if name.endswith(SHARD) else [content]
        assert ranges == [{"bytes": len(one), "sha256": hashlib.sha256(one).hexdigest()} for one in expected]


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


WRONG = "does not have the SHA-256 that the manifest says"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: (c / "host" / SHARD).unlink(), f"host/{SHARD} is missing"),
        (lambda c: os.truncate(c / "host" / SHARD, 10), f"host/{SHARD} has 10 bytes, the manifest says "),
        (lambda c: flip(c / "host" / SHARD, 0), f"host/{SHARD} {WRONG} for bytes 0 to 199 (range 1 of 2)"),
        (lambda c: flip(c / "host" / SHARD, 1015), f"host/{SHARD} {WRONG} for bytes 200 to "),
        (lambda c: flip(c / "trainer.json", 9), f"trainer.json {WRONG}"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda c: (c / "manifest.json").write_text('{"format": 1, "files": {}}'), "manifest.json has format 1, this"),
        (lambda c: (c / "manifest.json").write_text('{"format": 4, "files": {}}'), "manifest.json has format 4, this"),
        (lambda c: os.truncate(c / "manifest.json", 40), "manifest.json is not readable ("),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, damage, fault) -> None:  # type: ignore[no-untyped-def]
    older, newer = save(tmp_path, step=2), save(tmp_path, step=3)
    damage(newer)
    warnings: list[str] = []
    assert newest_complete(tmp_path, warnings.append) == older
    assert len(warnings) == 1
    assert warnings[0].startswith(f"checkpoint {newer} is passed over: {fault}")


def test_crash_before_the_rename_leaves_nothing_that_counts(tmp_path: Path) -> None:
    whole = save(tmp_path, step=2)

    class DyingShard(Shard):
        def write(self, folder: Path, place: Place) -> Records:
            super().write(folder, place)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, special(DyingShard, 1), STATE, {})
    assert (tmp_path / "step-000003.tmp").is_dir()
    assert newest_complete(tmp_path, pytest.fail) == whole
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    save(tmp_path, step=3)  # the same step again


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(tmp_path: Path) -> None:
    whole = save(tmp_path, step=2)

    class FullDisk(Shard):
        def write(self, folder: Path, place: Place) -> Records:
            (folder / SHARD).symlink_to("/dev/full")
            return super().write(folder, place)

    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, special(FullDisk, 1), STATE, {})
    assert str(caught.value) == (
        f"{tmp_path / 'step-000003'}: could not be written (process 0: [Errno 28] No space left on device); "
        "step-000002 is left as it was. Make room or mend the disk, and give the same command again: it goes on from "
        "the newest whole checkpoint"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"], "nothing takes room from the next try"
    assert newest_complete(tmp_path, pytest.fail) == whole
    assert find_fault(save(tmp_path, step=3)) is None


def test_a_save_behind_training_is_sealed_by_a_poll_and_waited_for_by_the_next(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, asynchronous=True, keep_last=1)
    writing, go_on = threading.Event(), threading.Event()

    class SlowShard(Shard):
        def write(self, folder: Path, place: Place) -> Records:
            writing.set()
            assert go_on.wait(60)
            return super().write(folder, place)

    host = special(SlowShard, 7)
    writer.save(host, dataclasses.replace(STATE, step=3, best_step=None), {})  # type: ignore[arg-type]
    assert writing.wait(60)
    host.value = 8
    for _ in range(3):
        writer.poll(writer.is_writing)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003.tmp"]
    go_on.set()
    limit = patience.Limit(60)
    while not checkpoint_steps(tmp_path) and not limit.passed():
        writer.poll(writer.is_writing)
    assert SavedTensors(tmp_path / "step-000003/host").whole("weight/value").unique().tolist() == [7]
    assert find_fault(tmp_path / "step-000003") is None
    go_on.clear()
    writer.save(host, dataclasses.replace(STATE, step=4, best_step=None), {})  # type: ignore[arg-type]
    threading.Timer(0.05, go_on.set).start()
    writer.save(host, dataclasses.replace(STATE, step=5, best_step=None), {})  # type: ignore[arg-type]
    assert checkpoint_steps(tmp_path)[-1] == 4, "the next save has waited for it, and with it for what it prunes"
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    assert find_fault(tmp_path / "step-000005") is None


def test_torn_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, value=1) / "host" / SHARD).unlink()
    assert find_fault(save(tmp_path, value=2)) is None


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "nothing", pytest.fail) is None
    assert checkpoint_steps(tmp_path) == []


def in_format_2(checkpoint: Path) -> Path:
    """Lays the files of a checkpoint of one process down as version 0.1.0 did: generators are tensors in a file."""
    host, manifest = checkpoint / "host", checkpoint / "manifest.json"
    tensors = load_file(host / SHARD)
    own = json.loads(bytes(tensors.pop("process/00000").tolist()))
    index = json.loads((host / "index.json").read_text())
    (host / SHARD).unlink()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, host / SHARD, {"runs": "{}"})
    (host / "index.json").write_text(json.dumps({**index, "shards": 1}))
    (checkpoint / "loader-00000.json").write_text(json.dumps(own["loader"]))
    states = own["generators"]
    states["numpy"][0] = torch.tensor(states["numpy"][0])
    torch.save(
        {**states, "torch": torch.tensor(states["torch"], dtype=torch.uint8)}, checkpoint / "generators-00000.pt"
    )
    step = json.loads(manifest.read_text())["step"]
    manifest.unlink()
    records = {
        file.relative_to(checkpoint).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in checkpoint.rglob("*")
        if file.is_file()
    }
    manifest.write_text(json.dumps({"format": 2, "step": step, "files": records}))
    return checkpoint


def test_a_checkpoint_of_format_2_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    checkpoint = in_format_2(save(tmp_path))
    assert find_fault(checkpoint) is None
    expected = torch.rand(3), np.random.rand(), random.random()
    np.random.seed(99)
    random.seed(torch.manual_seed(99).seed())
    host = NumberHost(0)
    state, loader_state = load_checkpoint(checkpoint, host, LAYOUT, pytest.fail)  # type: ignore[arg-type]
    assert (state, loader_state, host.value) == (STATE, {"micro_step": 6}, 7)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]
    now = SavedLayout("plain", None, 2, 1, 8)
    assert load_checkpoint(checkpoint, host, now, str)[1] == {"micro_step": 6, "shards": {}}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: os.truncate(c / "generators-00000.pt", 10), "generators-00000.pt has 10 bytes, the manifest says"),
        (lambda c: flip(c / "host" / SHARD, -1), f"host/{SHARD} {WRONG}"),
        (
            lambda c: (c / "manifest.json").write_text((c / "manifest.json").read_text().replace("loader-", "orderl-")),
            "manifest.json is damaged",
        ),
    ],
)
def test_damage_to_a_checkpoint_of_format_2_is_named(tmp_path: Path, damage, fault) -> None:  # type: ignore[no-untyped-def]
    checkpoint = in_format_2(save(tmp_path))
    damage(checkpoint)
    assert str(find_fault(checkpoint)).startswith(fault)


def test_another_layout_goes_on_and_is_told(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, NumberHost(7), STATE, {"micro_step": 6, "shards": {"a": 4}})
    now, told, host = SavedLayout("zero", 3, 2, 2, 16), [], NumberHost(0)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    state, loader_state = load_checkpoint(checkpoint, host, now, told.append)  # type: ignore[arg-type]
    assert told == [
        "step-000003 was written by plain on 1 process, 8 samples a step; going on with zero-3 on 2 processes, experts "
        "split over 2, 16 samples a step"
    ]
    assert (state, host.value) == (STATE, 7)
    assert loader_state == {"micro_step": 6, "shards": {}}  # where a stream stands is each replica's own
    assert not torch.equal(torch.get_rng_state(), before)


def test_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step=step)
    prune(tmp_path, keep_last=2, keep=2)
    assert checkpoint_steps(tmp_path) == [2, 4, 5]
    prune(tmp_path, keep_last=1, keep=5)
    assert checkpoint_steps(tmp_path) == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    assert step_folder(tmp_path, 5).is_dir()
