"""A run's folder: its files, the lock of the process that writes into it, and the check that a plan may resume in it.

runs/NAME/
plan.yaml               the resolved plan
environment.json        versions, hardware, commit of the latest start
amendments.json         what later starts have changed in the plan, and after which step
run.lock                locked by the process that writes here
heartbeats/             the last sign of each process (engine.watch.watchdog)
hangs/TIME/             stack traces of all processes where the run hung
stages/NN-NAME/
metrics.jsonl  tensorboard/  checkpoints/  rollbacks.json  quarantine.jsonl
evaluation.json  handover.json  routing.html
curve.jsonl             scores by time, one line each (engine.telemetry.curve)
unevaluated.json        steps at which an evaluation failed, and why
curve_failed.json       the same of the curve, which then ends
weights.safetensors     whole weights at the end of the stage
complete.json           the stage is complete; whether its evaluation is still due; the hash of its weights
report.html
"""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RunFileError, unwritable
from engine.processes.files import read_json, remove_folder
from omnivl.data.plain_files import not_through_links
from omnivl.errors import UserError

LOCK = "run.lock"

_FREE_FIELDS = tuple(
    re.compile(pattern)
    for pattern in (
        r"name",
        r"(logging|launch|checkpoint|guard)(\..*)?",
        r"loader\.(num_workers|prefetch_factor|start_method|cache_decoded|cache_mebibytes|index_cache|stream_timeout_seconds)",
        r"loader\.(max_bad_fraction|min_samples_to_judge)",
        r"stages\.\d+\.evaluate(\..*)?",
        r"(stages\.\d+\.)?parallel\.(host|zero_stage|offload|offload_device|nvme_folder)",
        r"(stages\.\d+\.)?parallel\.(compile|deterministic|expert_parallel_size|pipeline_(stages|profile))",
        r"(stages\.\d+\.)?batch\.(micro_batch_size_per_gpu|gradient_accumulation_steps|global_batch_size)",
    )
)
"""Fields that may differ between two starts in one folder: they change what is displayed and kept, and the devices and
processes. Batch sizes are among them so that another number of processes can take the same samples in each step."""

_STAGE = re.compile(r"stages\.\d+")
_STEPS = re.compile(r"stages\.\d+\.steps")


class RunFolderError(UserError):
    """A run folder is in use or holds another run."""


def not_writable(folder: Path, reason: str) -> RunFolderError:
    """The error for a run's folder in which nothing can be written."""
    return RunFolderError(
        f"--run-folder: got {folder}, in which nothing can be written ({reason}); allowed a folder of yours, there or "
        "not; choose another one"
    )


@dataclass(frozen=True)
class StageFolder:
    """One stage's part of a run folder."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON line per record."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-...`` folders."""
        return self.path / "checkpoints"

    @property
    def rollbacks(self) -> Path:
        """When the stage went back to an earlier checkpoint."""
        return self.path / "rollbacks.json"

    @property
    def evaluation(self) -> Path:
        """Results of the last evaluation."""
        return self.path / "evaluation.json"

    @property
    def unevaluated(self) -> Path:
        """Failed evaluations: the step of each, and why it failed."""
        return self.path / "unevaluated.json"

    @property
    def curve(self) -> Path:
        """Scores by time, one JSON line each."""
        return self.path / "curve.jsonl"

    @property
    def curve_failed(self) -> Path:
        """Why the curve has ended early: a step and what failed there."""
        return self.path / "curve_failed.json"

    @property
    def handover(self) -> Path:
        """What was carried over from the earlier stage."""
        return self.path / "handover.json"

    @property
    def weights(self) -> Path:
        """Whole weights at the end of the stage."""
        return self.path / "weights.safetensors"

    @property
    def quarantine(self) -> Path:
        """Log of bad samples."""
        return self.path / "quarantine.jsonl"

    def completed_steps(self) -> int | None:
        """Steps with which the stage was completed; None where it was not."""
        return None if (marker := self._completion()) is None else marker["steps"]

    def awaits_evaluation(self) -> bool:
        """Whether the stage is complete, and was not yet evaluated after its last step."""
        marker = self._completion()
        return marker is not None and bool(marker.get("evaluation_due", False))

    def mark_trained(self, steps: int, weights: str) -> None:
        """Marks the stage complete but for its evaluation. Called when weights and checkpoint are on disk.

        Args:
            steps: Its optimizer steps.
            weights: SHA-256 of its weights (``engine.disk.weights_file``).
        """
        write_whole(self._marker, json.dumps({"steps": steps, "evaluation_due": True, "weights": weights}))

    def mark_complete(self, steps: int) -> None:
        """Marks the stage complete. Called when all its files are on disk."""
        known = self._completion() or {}
        write_whole(self._marker, json.dumps({"steps": steps} | {k: v for k, v in known.items() if k == "weights"}))

    @property
    def _marker(self) -> Path:
        return self.path / "complete.json"

    def _completion(self) -> Mapping[str, Any] | None:
        if not self._marker.exists():
            return None
        remedy = "remove it: omnivl pretrain then completes the stage again, from its newest checkpoint"
        marker = read_json(self._marker, dict, remedy)
        if type(marker.get("steps")) is not int:
            raise RunFileError(f"{self._marker}: got no number of steps in it; {remedy}")
        return marker

    def has_begun(self) -> bool:
        """Whether the stage has written any file."""
        return self.metrics.is_file() or self.checkpoints.is_dir()


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @property
    def plan(self) -> Path:
        """The resolved plan."""
        return self.path / "plan.yaml"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def amendments(self) -> Path:
        """What later starts have changed in the plan."""
        return self.path / "amendments.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    @property
    def heartbeats(self) -> Path:
        """Signs of life, of the latest start."""
        return self.path / "heartbeats"

    @property
    def hangs(self) -> Path:
        """Stack traces."""
        return self.path / "hangs"

    def stage(self, index: int, name: str) -> StageFolder:
        """The folder of stage ``index`` (from 0)."""
        return StageFolder(self.path / "stages" / f"{index + 1:02d}-{name}")

    def clear(self, first_stage: int = 0) -> None:
        """Deletes what an earlier start left here. The caller holds the lock.

        Args:
            first_stage: Index of the first stage that is deleted, with all that come after it.
        """
        for folder in sorted((self.path / "stages").glob("*-*")):
            number = folder.name.split("-")[0]
            if number.isdigit() and int(number) > first_stage:
                remove_folder(folder)
        shutil.rmtree(self.hangs, ignore_errors=True)
        for file in (self.plan, self.environment, self.amendments, self.report):
            file.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder against every other process. The lock is released when the process ends, also by a crash.

        Raises:
            RunFolderError: Somebody else holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = not_through_links(str(self.path / LOCK), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            reason = "a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
            raise not_writable(self.path, f"{error.filename}: {reason}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
                raise RunFolderError(
                    f"{self.path}: another run is writing here: {holder}. Wait for it, stop it, or choose another "
                    "folder with --run-folder."
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def check_same_plan(folder: RunFolder, earlier: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses a plan that differs from the one in the folder.

    ``_FREE_FIELDS`` may differ; a stage may become longer as long as no later stage has begun and its learning rate
    stays what it was; stages may be added at the end. ``engine.run.amendment`` says what else may change when asked to.

    Args:
        folder: The run's folder, for the message and for which stages have begun.
        earlier: The resolved plan in the folder, as plain containers.
        current: The resolved plan of this start.

    Raises:
        RunFolderError: Names every differing field with both values.
    """
    differences = [
        (path, before, now)
        for path, before, now in differing_fields(earlier, current)
        if not is_free(path)
        and not (_STAGE.fullmatch(path) and before is None)
        and not (_STEPS.fullmatch(path) and _may_become_longer(folder, current, path, before, now))
    ]
    if differences:
        lines = "\n".join(f"  {shown_change(one)}" for one in differences)
        raise RunFolderError(
            f"{folder.path}: holds a run of another plan:\n{lines}\nGo on with the earlier plan ({folder.plan}), start "
            "over with --fresh (deletes the earlier run), or choose another folder with --run-folder."
        )


def is_free(path: str) -> bool:
    """Whether a field may differ between two starts without being asked for."""
    return any(pattern.fullmatch(path) for pattern in _FREE_FIELDS)


def shown_change(change: tuple[str, Any, Any]) -> str:
    """A differing field with both values, in words."""
    path, before, now = change
    return f"{path}: was {_shown(before)}, is now {_shown(now)}"


def differing_fields(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Lists ``(dotted path, value before, value now)`` of every leaf that differs; a missing one is ``None``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [*before, *(name for name in now if name not in before)]
        inner = [(str(name), before.get(name), now.get(name)) for name in names]
    elif _is_list(before) and _is_list(now):
        length = max(len(before), len(now))
        padded = [[*values, *[None] * (length - len(values))] for values in (before, now)]
        inner = [(str(index), *pair) for index, pair in enumerate(zip(*padded, strict=True))]
    else:
        return [] if before == now else [(path, before, now)]
    return [
        difference
        for name, one, other in inner
        for difference in differing_fields(one, other, f"{path}.{name}" if path else name)
    ]


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name and renames it, so that a reader never sees a partly written one.

    Raises:
        RunFileError: It cannot be written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w", encoding="utf-8", opener=not_through_links) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _may_become_longer(folder: RunFolder, plan: Mapping[str, Any], path: str, before: Any, now: Any) -> bool:
    index = int(path.split(".")[1])
    schedule = plan["stages"][index].get("optimizer", {}).get("schedule", "constant")
    if before is None or now is None or now < before or schedule != "constant":
        return False
    later = list(enumerate(plan["stages"]))[index + 1 :]
    return not any(folder.stage(number, stage["name"]).has_begun() for number, stage in later)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
