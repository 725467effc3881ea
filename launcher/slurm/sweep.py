"""The runs of a sweep as job arrays: one for each combination of nodes and ranks."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from engine.plan.plan import Plan
from engine.sweep.config import Point, Sweep
from launcher.slurm.queue import job_rows, queue, submitted
from launcher.slurm.submission import Request, Submission, submission_folder, write_job
from launcher.start.local import local_processes


def write_arrays(
    sweep: Sweep, points: Sequence[Point], folder: Path, request: Request, parallel: int
) -> list[Submission]:
    """Writes a job array for all runs with equal nodes and ranks.

    Args:
        sweep: The sweep.
        points: Those of its runs that are wanted.
        folder: Of its runs.
        request: The resources of a job; its nodes apply to runs that set none.
        parallel: Tasks of an array that run at the same time at most.

    Raises:
        PlanError: A run does not fit its number of processes; nothing is written then.
    """
    shapes: dict[tuple[int, int], list[tuple[Plan, Path]]] = {}
    for point in points:
        nodes, processes = shape_of(point, request)
        plan = sweep.plan_for(point, nodes * processes)
        shapes.setdefault((nodes, processes), []).append((plan, folder / point.name))
    written = submission_folder(folder)
    return [
        write_job(sweep.name, runs, folder, written, request, request.spec(*shape), parallel=parallel)
        for shape, runs in shapes.items()
    ]


def shape_of(point: Point, request: Request) -> tuple[int, int]:
    """The nodes of a run, and its ranks on each."""
    processes = request.processes or local_processes(point.plan.launch.processes, request.gpus)
    return point.nodes or request.nodes, processes


def waiting_or_running(folder: Path) -> set[Path]:
    """Folders of a sweep's runs whose jobs run or wait.

    Args:
        folder: Of the sweep's runs.
    """
    if not (folder / "slurm" / "jobs.jsonl").is_file():
        return set()
    now = datetime.datetime.now().astimezone()
    return {Path(row.run) for row in job_rows(submitted(folder), queue(), now) if row.alive}
