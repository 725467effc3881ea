"""Going back to an earlier checkpoint within a stage, and remembering it.

A rollback is first written into ``rollbacks.json`` of the stage; then the stage starts over as after a crash. A
checkpoint holds the number of rollbacks before it. If that is less than the number in ``rollbacks.json``, the
checkpoint is older than the last rollbacks: it is void if it was taken at their first bad step or later; otherwise the
stage resumes from it, at the position in the data that the rollback holds. A crash at any moment in between therefore
changes nothing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.disk.checkpoint import checkpoint_steps, step_folder
from engine.disk.run_folder import write_whole
from engine.errors import RunFileError
from engine.processes.files import read_json


@dataclass(frozen=True)
class Rollback:
    """One rollback.

    Attributes:
        first_bad: The first bad step, counted from 1: checkpoints taken at it or later are void.
        step: Optimizer steps taken when it was decided.
        reason: Why the stage goes back.
        loaders: Position of each process in the data after the rollback; empty if the same data is used again.
    """

    first_bad: int
    step: int
    reason: str
    loaders: tuple[Mapping[str, Any], ...]


class RolledBackError(Exception):
    """Ends the loop of a stage, which then has to start again from an earlier checkpoint. Raised on every process."""

    def __init__(self, rollback: Rollback, number: int, allowed: int) -> None:
        """Makes the message.

        Args:
            rollback: Already written down.
            number: Its number within the stage, from 1.
            allowed: ``guard.rollbacks``.
        """
        data = "leaving out the data since then" if rollback.loaders else "with the same data"
        super().__init__(
            f"step {rollback.step}: {rollback.reason}; going back to before step {rollback.first_bad}, {data} "
            f"(rollback {number} of {allowed})"
        )


def read_rollbacks(path: Path) -> tuple[Rollback, ...]:
    """All rollbacks of a stage, oldest first.

    Args:
        path: ``rollbacks.json``; may be missing.

    Raises:
        RunFileError: It is cut or changed: without it nobody knows which data the stage leaves out.
    """
    if not path.is_file():
        return ()
    remedy = "put back a copy of it, or train the stage again with --fresh --stage NAME"
    entries = read_json(path, list, remedy)
    try:
        return tuple(Rollback(**{**entry, "loaders": tuple(entry["loaders"])}) for entry in entries)
    except (KeyError, TypeError) as error:
        raise RunFileError(f"{path}: got a file that is no list of rollbacks ({error!r}); {remedy}") from error


def write_rollbacks(path: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replaces the file in one atomic step. Called by one process."""
    write_whole(path, json.dumps([asdict(rollback) for rollback in rollbacks], indent=1))


def remove_void(checkpoints: Path, rollbacks: Sequence[Rollback]) -> None:
    """Deletes the checkpoints that a rollback has made void. Called by one process."""
    for step in checkpoint_steps(checkpoints):
        folder = step_folder(checkpoints, step)
        known = _rollbacks_known(folder)
        if known is not None and any(step >= later.first_bad for later in rollbacks[known:]):
            dropped = folder.with_suffix(".dropped")
            folder.rename(dropped)
            shutil.rmtree(dropped)


def position_in_data(pending: Sequence[Rollback], rank: int, world_size: int) -> Mapping[str, Any] | None:
    """Position in the data after rollbacks that are newer than a checkpoint; None if its own position is valid.

    Args:
        pending: Oldest first.
        rank: Of this process.
        world_size: Processes of this start. If their number has changed, streams search from their first shard.
    """
    loaders = next((rollback.loaders for rollback in reversed(pending) if rollback.loaders), ())
    if not loaders:
        return None
    return loaders[rank] if len(loaders) == world_size else {**loaders[0], "shards": {}}


def _rollbacks_known(checkpoint: Path) -> int | None:
    """Number of rollbacks before a checkpoint was taken; None if it cannot be read, which is reported elsewhere."""
    try:
        return int(read_json(checkpoint / "trainer.json", dict, "").get("rollbacks", 0))
    except (RunFileError, ValueError, TypeError):
        return None
