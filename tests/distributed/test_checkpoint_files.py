"""Files of a checkpoint that processes of several machines have written, and what goes on from them."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_zero_state import assert_same, make_host, state_after, train

from engine.disk.checkpoint import (
    SavedLayout,
    checkpoint_steps,
    find_fault,
    find_fault_together,
    load_checkpoint,
    newest_complete,
)
from engine.disk.checkpoint_writer import CheckpointWriter
from engine.hosts import shards
from engine.processes import ranks
from engine.processes.files import FileRecord, damaged_ranges

HOSTS = ["plain", "zero1", "zero3", "zero2-offload-muon", "pipe2-zero1"]
WHOLE = "step-000001"
FOUR = SavedLayout("zero", 3, 4, 1, 8)

pytestmark = pytest.mark.distributed


def save(folder: str, machines: str) -> dict[str, Any]:
    """Worker: a checkpoint of each host, by processes that run on the machines of these letters; then two steps."""
    report: dict[str, Any] = {}
    me = ranks.rank()
    shards.machine = lambda: machines[me]
    for name in HOSTS:
        host = make_host(name)
        train(host, range(3))
        torch.manual_seed(me)
        writer = CheckpointWriter(Path(folder) / name, asynchronous=True, keep_last=2)
        writer.save(host, replace(state_after(3), layout=FOUR), {"micro_step": 6, "shards": {"a": me}})
        writer.finish()
        report[name] = {"saved": host.full_weights(), "drawn": torch.rand(3)}
        report[name] |= {"results": train(host, range(3, 5)), "weights": host.full_weights()}
    return report


def go_on(folder: str) -> dict[str, Any]:
    """Worker: what each host saved goes on, on other machines and perhaps in other numbers."""
    report: dict[str, Any] = look_together(Path(folder) / "damaged")
    for name in HOSTS:
        host, layout = make_host(name, seed=1), replace(FOUR, world_size=ranks.world_size())
        _, position = load_checkpoint(Path(folder) / name / "step-000003", host, layout, print)
        report[name] = {"saved": host.full_weights(), "drawn": torch.rand(3), "position": position}
        report[name] |= {"results": train(host, range(3, 5)), "weights": host.full_weights()}
    return report


def look_together(folder: Path) -> dict[str, Any]:
    """Which of a folder's checkpoints all processes find whole, and how many bytes of it this one read for that."""
    read: list[int] = []
    passed: list[str] = []

    def counted(path: Path, records: Sequence[FileRecord], chosen: Sequence[int]) -> Iterator[int]:
        if WHOLE in path.parts:  # in others it stops at the first damage
            read.append(sum(records[index]["bytes"] for index in chosen))
        return damaged_ranges(path, records, chosen)

    steps = ranks.from_first(checkpoint_steps(folder), list[int])
    with mock.patch("engine.disk.checkpoint.damaged_ranges", counted):
        found = newest_complete(folder, passed.append, steps=steps, find=find_fault_together)
    return {"found": None if found is None else found.name, "passed": passed, "read": sum(read)}


def damage(checkpoint: Path, folder: Path) -> list[str]:
    """Writes copies of a checkpoint, the newer ones damaged, and says which faults are to be found, newest first."""
    faults = []
    for step, (name, place) in enumerate([("", 0), ("trainer.json", 0), ("host/shard-00001.safetensors", -1)], 1):
        copy = folder / f"step-{step:06d}"
        shutil.copytree(checkpoint, copy)
        manifest = json.loads((copy / "manifest.json").read_bytes())
        (copy / "manifest.json").write_text(json.dumps({**manifest, "step": step}))
        if name:
            content = bytearray((copy / name).read_bytes())
            content[place] ^= 1
            (copy / name).write_bytes(content)
            faults.append(f"checkpoint {copy} is passed over: {find_fault(copy)}")
    return faults[::-1]


def test_processes_of_a_machine_write_one_file_and_any_others_go_on(run_distributed: Any, tmp_path: Path) -> None:
    """Machines with one and three processes, whose ranks do not follow each other."""
    folder = str(tmp_path / "saved")
    saved = run_distributed(save, processes=4, folder=folder, machines="abaa")
    for name in HOSTS:
        checkpoint = tmp_path / "saved" / name / "step-000003"
        files = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
        machines = ["host/shard-00000.safetensors", "host/shard-00001.safetensors"]
        assert files == ["host/index.json", *machines, "manifest.json", "trainer.json"], name
        assert find_fault(checkpoint) is None
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        assert [len(manifest[file]) for file in machines] == [6, 2], "header and data of each process"
        changed = bytearray((checkpoint / machines[0]).read_bytes())
        begin = sum(one["bytes"] for one in manifest[machines[0]][:4])
        changed[begin] ^= 1
        (checkpoint / machines[0]).write_bytes(changed)
        said = f"{machines[0]} does not have the SHA-256 that the manifest says for bytes {begin} to "
        assert str(find_fault(checkpoint)).startswith(said) and "(range 5 of 6)" in str(find_fault(checkpoint))
        changed[begin] ^= 1
        (checkpoint / machines[0]).write_bytes(changed)
    checkpoint = tmp_path / "saved" / "zero1" / "step-000003"
    passed = damage(checkpoint, tmp_path / "saved" / "damaged")
    resumed = run_distributed(go_on, processes=4, folder=folder)
    size = sum(file.stat().st_size for file in checkpoint.rglob("*.*") if file.name != "manifest.json")
    for rank, (ours, theirs) in enumerate(zip(resumed, saved, strict=True)):
        assert (ours["found"], ours["passed"]) == (WHOLE, passed), rank
        assert 0 < ours["read"] < 0.4 * size, "each process reads its share"
        for name in HOSTS:
            assert ours[name]["position"] == {"micro_step": 6, "shards": {"a": rank}}
            assert torch.equal(ours[name]["drawn"], theirs[name]["drawn"]), (name, rank)
            assert ours[name]["results"] == theirs[name]["results"], (name, rank)
            if rank == 0:
                assert_same(ours[name]["weights"], theirs[name]["weights"])
    assert sum(ours["read"] for ours in resumed) == size
    for rank, ours in enumerate(run_distributed(go_on, processes=2, folder=folder)):
        assert (ours["found"], ours["passed"]) == (WHOLE, passed), rank
        for name in HOSTS:
            assert ours[name]["position"] == {"micro_step": 6, "shards": {}}
            if rank == 0:
                assert_same(ours[name]["saved"], saved[0][name]["saved"])
