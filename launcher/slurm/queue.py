"""The jobs of a run: the state of each in Slurm's queue, and the progress of its run."""

import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.slurm.progress import StageProgress, estimated_end, read_progress
from omnivl.errors import UserError

_GONE = "LEFT THE QUEUE"
_ACTIVE = ("RUNNING", "COMPLETING")
_ALIVE = (
    *_ACTIVE,
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "RESIZING",
)


@dataclass(frozen=True)
class JobRow:
    """One job, or one task of an array.

    Attributes:
        job: Its number, ``12`` or ``12_3``.
        run: Its run's folder.
        state: Slurm's name of the state, or that Slurm does not know the job any more.
        why: Slurm's reason for waiting, or the nodes.
        stage: The stage at which its run is.
        step: Optimizer steps that this stage has taken.
        steps: Steps that it has.
        samples_per_second: From the last line of metrics.
        end: Estimated end of a job that runs, in ISO 8601.
    """

    job: str
    run: str
    state: str
    why: str
    stage: str | None
    step: int | None
    steps: int | None
    samples_per_second: float | None
    end: str | None

    @property
    def alive(self) -> bool:
        """Whether the job runs or waits."""
        return self.state in _ALIVE


def queue() -> dict[str, tuple[str, str]]:
    """State and reason or nodes of every job of this user that Slurm still knows, tasks of arrays one by one.

    Raises:
        UserError: There is no Slurm here, or it does not answer.
    """
    command = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "squeue: got no such command; go to a machine from which jobs of Slurm are submitted"
        ) from error
    if done.returncode != 0:
        raise UserError(
            f"squeue gives no list; mend what it says, or go to a machine of the cluster:\n{done.stderr.strip()}"
        )
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {job: (state, why) for job, state, why in rows}


def submitted(run: Path) -> list[Mapping[str, Any]]:
    """What was submitted for a run or a sweep, in its order: ``job``, ``stage`` and ``folders`` of each job.

    Args:
        run: The folder that ``omnivl submit`` named.

    Raises:
        UserError: No job of the run was ever submitted, or its list is damaged.
    """
    file = run / "slurm" / "jobs.jsonl"
    if not file.is_file():
        raise UserError(
            f"{run}: got a folder without slurm/jobs.jsonl; allowed one for which jobs were submitted; name one that "
            "omnivl submit has printed"
        )
    records: list[Mapping[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"job", "stage", "folders"} <= record.keys():
            raise UserError(f"{file}:{number}: got a line that is no record of a job; remove the line")
        records.append(record)
    return records


def job_rows(
    records: Sequence[Mapping[str, Any]], known: Mapping[str, tuple[str, str]], now: datetime.datetime
) -> list[JobRow]:
    """The jobs of one run folder, in the order in which they were submitted.

    Args:
        records: What ``submitted`` returned.
        known: What ``queue`` returned.
        now: The present time.
    """
    rows = []
    for record in records:
        folders = [Path(folder) for folder in record["folders"]]
        array = f"{record['job']}_0" in known or len(folders) > 1
        for index, folder in enumerate(folders):
            job = f"{record['job']}_{index}" if array else str(record["job"])
            stages = read_progress(folder)
            if record["stage"] is not None:
                stages = [stage for stage in stages if stage.name == record["stage"]]
            rows.append(_row(job, folder, known.get(job), stages, now))
    return rows


def _row(
    job: str, folder: Path, known: tuple[str, str] | None, stages: list[StageProgress], now: datetime.datetime
) -> JobRow:
    complete = bool(stages) and all(stage.complete for stage in stages)
    state, why = known or ("COMPLETED" if complete else _GONE, "")
    current = next((stage for stage in stages if not stage.complete), stages[-1] if stages else None)
    end = estimated_end(stages, now) if state in _ACTIVE and not complete else None
    return JobRow(
        job,
        str(folder),
        state,
        "" if why == "(None)" else why,
        None if current is None else current.name,
        None if current is None else current.taken,
        None if current is None else current.steps,
        None if current is None else current.samples_per_second,
        None if end is None else end.isoformat(timespec="seconds"),
    )
