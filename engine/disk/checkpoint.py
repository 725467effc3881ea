"""Checkpoints: each is either whole or can be recognised as incomplete.

A checkpoint is written under another name (``engine.disk.checkpoint_writer``), every file is synced to disk, a manifest
with the size and SHA-256 of every file is written last, then the folder is renamed in one atomic step. A crash leaves
either a ``.tmp`` folder, which is never read, or a folder whose files do not match their manifest, which is reported
and skipped.

    checkpoints/step-000123/
        manifest.json           sizes and hashes of all files below, of large ones by ranges
        trainer.json            step, skipped steps, best score, metrics offset, layout
        host/                   a file of each machine (``engine.hosts.shards``): weights, moments, twins, queue, and of
                                each process its position in the data and its global random generators

Checkpoints of format 2 are read as well. They have a file of tensors for each process, not for each machine, and beside
it ``loader-00000.json`` and ``generators-00000.pt``.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from engine.errors import CheckpointError
from engine.hosts.base import Host
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.shards import INDEX
from engine.processes import ranks
from engine.processes.files import FileRecord, damaged_ranges, read_whole, remove_folder
from engine.processes.seeds import restore_generators, seed_everything

MANIFEST = "manifest.json"
HOST_FOLDER = "host"
FORMAT = 3
_NAME = re.compile(r"step-(\d{6,})")
_ALWAYS = {
    2: ("trainer.json", "loader-00000.json", "generators-00000.pt"),
    FORMAT: ("trainer.json", f"{HOST_FOLDER}/{INDEX}"),
}
"""By the formats that are read: files that each checkpoint has."""
_OURS = re.compile(r"trainer\.json|loader-\d{5,}\.json|generators-\d{5,}\.pt|host/[^/]+")
"""Files of a checkpoint; others, such as those of a file system, may lie beside them."""
_LEFTOVER = re.compile(r"step-\d{6,}\.(tmp|dropped)")


@dataclass(frozen=True)
class SavedLayout:
    """The parallel layout of the run that wrote a checkpoint. A run of any other layout can read it.

    Attributes:
        host: Kind of host.
        zero_stage: ZeRO stage; None for hosts that have none.
        world_size: Number of processes.
        expert_parallel_size: Processes over which banks of experts were split.
        samples_per_step: Samples of an optimizer step over all processes.
        pipeline_stages: Pipeline stages into which the chain was cut.
    """

    host: str
    zero_stage: int | None
    world_size: int
    expert_parallel_size: int
    samples_per_step: int
    pipeline_stages: int = 1

    def __str__(self) -> str:
        zero = "" if self.zero_stage is None else f"-{self.zero_stage}"
        split = "" if self.expert_parallel_size == 1 else f", experts split over {self.expert_parallel_size}"
        split += "" if self.pipeline_stages == 1 else f", {self.pipeline_stages} pipeline stages"
        processes = f"{self.world_size} process{'' if self.world_size == 1 else 'es'}"
        return f"{self.host}{zero} on {processes}{split}, {self.samples_per_step} samples a step"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """How far a stage has come, as ``trainer.json`` has it.

    Attributes:
        step: Optimizer steps taken, which is the index of the next one.
        skipped: Steps that were skipped for a loss or gradient that was not finite.
        skipped_in_a_row: How many of them were the last ones.
        best: Best score so far; None before the first evaluation.
        best_step: Step of the checkpoint that reached it.
        best_of: What it is the best of, in words: ``highest TASK/FIGURE``.
        metrics_bytes: Length of metrics.jsonl when the checkpoint was taken; later lines are removed on resuming.
        window: Sums for the next line of metrics (``engine.step.loss_window``).
        layout: The parallel layout that wrote the checkpoint.
        guard: Recent losses (``engine.step.guard``).
        rollbacks: How often the stage had gone back (``engine.disk.rollback``).
        evaluation_due: Whether an evaluation at this step was still to come when the checkpoint was taken.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int | None = None
    best_of: str | None = None
    metrics_bytes: int = 0
    window: Mapping[str, Any] = field(default_factory=dict)
    layout: SavedLayout
    guard: Mapping[str, Any] = field(default_factory=dict)
    rollbacks: int = 0
    evaluation_due: bool = False

    def evaluated(self, figure: float | None, best_of: str | None) -> Self:
        """The state after an evaluation.

        Args:
            figure: The best so far, or None.
            best_of: What it is the best of.
        """
        if figure is None:
            return replace(self, evaluation_due=False)
        return replace(self, evaluation_due=False, best=figure, best_step=self.step, best_of=best_of)


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint taken after ``step`` optimizer steps."""
    return folder / f"step-{step:06d}"


def find_fault(checkpoint: Path) -> str | None:
    """Describes what is wrong with a checkpoint; None if every file matches the manifest.

    Args:
        checkpoint: A ``step-...`` folder.
    """
    listed = _listed(checkpoint)
    if listed.fault is not None:
        return listed.fault
    damage = _damage(checkpoint, listed.files)
    return None if damage is None else damage.fault


def find_fault_together(checkpoint: Path) -> str | None:
    """As ``find_fault``, by all processes, each of which reads its share of the bytes. Called by every process.

    Args:
        checkpoint: A ``step-...`` folder that every process can read.
    """
    listed = ranks.on_first(lambda: _listed(checkpoint), _Listed)
    if listed.fault is not None:
        return listed.fault
    sizes = [record["bytes"] for of_file in listed.files.values() for record in of_file]
    largest_first = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    own = frozenset(largest_first[ranks.rank() :: ranks.world_size()])
    found = ranks.gather(_damage(checkpoint, listed.files, own), _Damage | None)
    damage = min((one for one in found if one is not None), key=lambda one: one.place, default=None)
    return None if damage is None else damage.fault


@dataclass(frozen=True)
class _Listed:
    """What a manifest says.

    Attributes:
        files: Of each file the records of its ranges.
        fault: What is wrong with the manifest, or with a file that is missing or of another size; None if nothing is.
    """

    files: dict[str, list[FileRecord]]
    fault: str | None


@dataclass(frozen=True)
class _Damage:
    """A range of a file that is not as recorded, or that cannot be read.

    Attributes:
        place: Its place among all ranges of all files.
        fault: In words.
    """

    place: int
    fault: str


def _listed(checkpoint: Path) -> _Listed:
    try:
        files = read_manifest(checkpoint)
        for name, ranges in files.items():
            file, size = checkpoint / name, sum(one["bytes"] for one in ranges)
            if not file.is_file():
                return _Listed({}, f"{name} is missing")
            if file.stat().st_size != size:
                return _Listed({}, f"{name} has {file.stat().st_size} bytes, the manifest says {size}")
    except CheckpointError as error:
        return _Listed({}, str(error))
    except OSError as error:
        return _Listed({}, _unreadable(error))
    return _Listed(files, None)


def _damage(
    checkpoint: Path, files: Mapping[str, Sequence[FileRecord]], chosen: Collection[int] | None = None
) -> _Damage | None:
    """The first range that is not as recorded, among all of all files or those in the chosen places; None: all are."""
    place = 0
    for name, of_file in files.items():
        own = [index for index in range(len(of_file)) if chosen is None or place + index in chosen]
        try:
            damaged = next(damaged_ranges(checkpoint / name, of_file, own), None) if own else None
        except OSError as error:
            return _Damage(place + own[0], _unreadable(error))
        if damaged is not None:
            where = f" for {_bytes_of(damaged, of_file)}" if len(of_file) > 1 else ""
            fault = f"{name} does not have the SHA-256 that the manifest says{where}"
            return _Damage(place + damaged, fault)
        place += len(of_file)
    return None


def _unreadable(error: OSError) -> str:
    return f"{error.filename} cannot be read ({error.strerror})"


def _bytes_of(index: int, ranges: Sequence[FileRecord]) -> str:
    begin = sum(one["bytes"] for one in ranges[:index])
    return f"bytes {begin} to {begin + ranges[index]['bytes'] - 1} (range {index + 1} of {len(ranges)})"


def read_manifest(checkpoint: Path) -> dict[str, list[FileRecord]]:
    """Sizes and hashes of all files of a checkpoint, as its manifest says: of the ranges of each, in their order.

    Args:
        checkpoint: A ``step-...`` folder.

    Raises:
        CheckpointError: The manifest is missing or damaged, or leaves out a file that has to be, or is, in the folder.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{MANIFEST} is missing")
    try:
        manifest = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not readable ({error})") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{MANIFEST} is not readable (it is no mapping)")
    if (made := manifest.get("format")) not in (2, FORMAT):
        raise CheckpointError(f"{MANIFEST} has format {made}, this version reads 2 and {FORMAT}")
    if (step := _NAME.fullmatch(checkpoint.name)) and manifest.get("step") != int(step[1]):
        raise CheckpointError(f"{MANIFEST} is of step {manifest.get('step')}")
    files = manifest.get("files")
    if made == 2 and isinstance(files, dict):
        files = {name: [record] for name, record in files.items()}
    if not isinstance(files, dict) or not all(_are_records(name, ranges) for name, ranges in files.items()):
        raise CheckpointError(f"{MANIFEST} is damaged: it does not say name, size and SHA-256 of every file")
    present = (file.relative_to(checkpoint).as_posix() for file in sorted(checkpoint.rglob("*")))
    unnamed = [name for name in (*_ALWAYS[made], *present) if _OURS.fullmatch(name) and name not in files]
    if unnamed:
        raise CheckpointError(f"{MANIFEST} does not name {unnamed[0]}")
    return files


def _are_records(name: str, ranges: object) -> bool:
    """Whether an entry of a manifest is a file in the checkpoint with sizes and hashes."""
    return (
        _OURS.fullmatch(name) is not None
        and isinstance(ranges, list)
        and len(ranges) > 0
        and all(
            isinstance(one, dict)
            and one.keys() == FileRecord.__annotations__.keys()
            and type(one["bytes"]) is int
            and one["bytes"] >= 0
            and isinstance(one["sha256"], str)
            for one in ranges
        )
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, ascending, whole or not."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match is not None)


def newest_complete(
    folder: Path,
    warn: Callable[[str], None],
    *,
    steps: Sequence[int] | None = None,
    find: Callable[[Path], str | None] = find_fault,
) -> Path | None:
    """Finds the newest checkpoint that is whole.

    Args:
        folder: The stage's ``checkpoints`` folder.
        warn: Called with one message for each checkpoint that is skipped, with the reason.
        steps: Of its checkpoints, ascending; None looks for them.
        find: ``find_fault``, or ``find_fault_together`` where every process calls this, with the same steps.
    """
    for step in reversed(checkpoint_steps(folder) if steps is None else steps):
        candidate = step_folder(folder, step)
        fault = find(candidate)
        if fault is None:
            return candidate
        warn(f"checkpoint {candidate} is passed over: {fault}")
    return None


def load_checkpoint(
    checkpoint: Path, host: Host, layout: SavedLayout, tell: Callable[[str], None]
) -> tuple[TrainerState, dict[str, Any]]:
    """Restores host and random generators. Called by every process.

    If the number of processes has changed since the checkpoint was written, weights, moments and the order of the data
    continue as before, random generators (dropout, noise) are seeded anew, and streams search for their position from
    their first shard.

    Args:
        checkpoint: A whole checkpoint.
        host: The host whose tensors are restored.
        layout: This run's layout.
        tell: Gets a message where the layout has changed.

    Returns:
        The loop's state and this process' position in the data.

    Raises:
        CheckpointError: The files do not fit the model.
    """
    state = read_trainer(checkpoint)
    if state.layout != layout:
        tell(f"{checkpoint.name} was written by {state.layout}; going on with {layout}")
    host.load(checkpoint / HOST_FOLDER)
    me = ranks.rank()
    if state.layout.world_size == layout.world_size:
        own = _state_of_process(checkpoint, me)
        restore_generators(own["generators"])
        return state, own["loader"]
    seed_everything("resumed", state.step, me)
    return state, {**_state_of_process(checkpoint, 0)["loader"], "shards": {}}


def _state_of_process(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Position in the data and random generators of a process of the run that wrote a checkpoint."""
    loader = checkpoint / f"loader-{rank:05d}.json"
    if not loader.is_file():
        return SavedTensors(checkpoint / HOST_FOLDER).state(rank)
    generators = torch.load(checkpoint / f"generators-{rank:05d}.pt", weights_only=True)  # format 2
    return {"loader": json.loads(read_whole(loader)), "generators": generators}


def read_trainer(checkpoint: Path) -> TrainerState:
    """How far the stage had come at a checkpoint.

    Raises:
        CheckpointError: A newer version has written it, or it is damaged.
    """
    remedy = "verify it with omnivl checkpoint verify; if it is whole, use the version that has written it, or a newer"
    try:
        raw = json.loads(read_whole(checkpoint / "trainer.json"))
        return TrainerState(**{**raw, "layout": SavedLayout(**raw["layout"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: got a trainer.json that cannot be read ({error!r}); {remedy}") from error


def prune(folder: Path, keep_last: int, keep: int | None) -> None:
    """Deletes old checkpoints. Called by one process.

    Args:
        folder: The stage's ``checkpoints`` folder.
        keep_last: Number of newest checkpoints to keep, at least 1.
        keep: Step of one more checkpoint to keep (the best).
    """
    assert keep_last >= 1
    for step in checkpoint_steps(folder)[:-keep_last]:
        if step != keep:
            # renamed first, so that a crash while deleting leaves nothing that looks like a checkpoint
            dropped = step_folder(folder, step).with_suffix(".dropped")
            step_folder(folder, step).rename(dropped)
            shutil.rmtree(dropped)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a crash left half written or half deleted. Called by one process that holds the run's lock."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                remove_folder(path)
