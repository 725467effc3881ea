"""Writes jobs into a run's folder and submits them."""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from engine.disk.run_folder import write_whole
from engine.plan.plan import Plan
from engine.telemetry.console import say
from launcher.slurm.profile import ClusterProfile
from launcher.slurm.script import OptionValue, job_name, job_script, log_pattern
from launcher.slurm.spec import JobRun, JobSpec
from omnivl.data.plain_files import not_through_links
from omnivl.errors import UserError


@dataclass(frozen=True)
class Request:
    """The resources that jobs request of Slurm.

    Attributes:
        profile: The cluster.
        nodes: Number of nodes of a job that does not set it.
        gpus: On each node; 0 for CPUs.
        processes: Ranks on each node; None takes the plan's number.
        options: Options of ``sbatch`` that the caller asks for, before those of the cluster.
    """

    profile: ClusterProfile
    nodes: int
    gpus: int
    processes: int | None
    options: Mapping[str, OptionValue]

    def header(self, nodes: int, processes: int) -> dict[str, OptionValue]:
        """All options of a job with these nodes and ranks on each, except for names and paths."""
        own: dict[str, OptionValue] = {
            "nodes": nodes,
            "ntasks-per-node": processes,
            "requeue": True,
            "open-mode": "append",
            "signal": f"B:USR1@{self.profile.grace_seconds}",
        }
        if self.gpus and "gres" not in self.profile.sbatch:
            own["gpus-per-node"] = self.gpus
        return {**own, **self.profile.sbatch, **self.options}

    def spec(
        self, nodes: int, processes: int, *, stage: str | None = None, fresh: bool = False, amend: bool = False
    ) -> JobSpec:
        """The description of a job, before its runs are known."""
        return JobSpec((), nodes, processes, self.gpus, self.profile, stage, fresh, amend)


@dataclass(frozen=True)
class Submission:
    """One job as it is written.

    Attributes:
        script: For sbatch.
        stage: The only stage that it runs, if it is one of a chain.
        folders: The folders of its runs.
        log: Where its log will lie, with Slurm's place holders.
    """

    script: Path
    stage: str | None
    folders: tuple[Path, ...]
    log: str

    def as_json(self, job: str | None) -> dict[str, Any]:
        """A description for scripts; ``job`` is its number once it is submitted."""
        log = self.log if job is None else self.log.replace("%j", job).replace("%A", job).replace("%a", "*")
        number = None if job is None else int(job)
        folders = [str(path) for path in self.folders]
        return {"job": number, "stage": self.stage, "script": str(self.script), "log": log, "folders": folders}


def submission_folder(folder: Path) -> Path:
    """The folder of the files of this submission."""
    return folder / "slurm" / time.strftime("submitted-%Y%m%d-%H%M%S")


def write_job(
    name: str,
    runs: Sequence[tuple[Plan, Path]],
    folder: Path,
    written: Path,
    request: Request,
    spec: JobSpec,
    *,
    parallel: int | None = None,
) -> Submission:
    """Writes a job, or a job array with a task for each run.

    Args:
        name: Shown by squeue.
        runs: Plan and folder of each.
        folder: The logs are in its folder ``slurm``.
        written: Folder of plans, specification and script.
        request: The requested resources.
        spec: From ``request.spec``.
        parallel: Tasks of an array that run at the same time at most; None for a job of one run.
    """
    log = log_pattern(folder, "slurm/%j.log" if parallel is None else "slurm/%A_%a.log")
    options = {"job-name": job_name(name), **request.header(spec.nodes, spec.processes_per_node), "output": log}
    file, plan_file = "job" if spec.stage is None else f"job-{spec.stage}", "plan.yaml"
    if parallel is not None:
        options["array"] = f"0-{len(runs) - 1}%{parallel}"
        file, plan_file = f"job-{spec.nodes}x{spec.processes_per_node}", "plan-{}.yaml"
    text = job_script(options, spec.profile, written / f"{file}.json")
    written.mkdir(parents=True, exist_ok=True)
    tasks = []
    for plan, place in runs:
        said = written / plan_file.format(place.name)
        write_whole(said, plan.to_yaml())
        tasks.append(JobRun(str(said), str(place)))
    JobSpec(**{**vars(spec), "tasks": tuple(tasks)}).write(written / f"{file}.json")
    script = written / f"{file}.sh"
    write_whole(script, text)
    return Submission(script, spec.stage, tuple(place for _, place in runs), log)


def hand_in(
    submissions: Sequence[Submission], folder: Path, *, chained: bool, dry_run: bool, as_json: bool = False
) -> None:
    """Submits jobs, records them for ``omnivl jobs``, and prints where their logs lie.

    Args:
        submissions: In their order.
        folder: The folder by which ``omnivl jobs`` finds them.
        chained: Each starts after the one before has ended well.
        dry_run: Print the scripts and submit none.
        as_json: Print a list of job, stage, script, log and folders of runs instead.
    """
    told: list[dict[str, Any]] = []
    before: str | None = None
    for submission in submissions:
        after = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if chained and before else []
        before = None if dry_run else _sbatch(submission.script, after)
        told.append(submission.as_json(before))
        if not dry_run:
            with open(folder / "slurm" / "jobs.jsonl", "a", opener=not_through_links) as file:
                file.write(json.dumps(told[-1] | {"time": time.time()}) + "\n")
        if as_json:
            continue
        if dry_run:
            say(f"{submission.script.read_text()}# not submitted; written: {submission.script}")
        else:
            what = "" if submission.stage is None else f", stage {submission.stage}"
            say(f"job {before}{what}: {told[-1]['log']}")
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    elif not dry_run:
        say(f"state and progress: omnivl jobs {folder}")


def _sbatch(script: Path, options: Sequence[str]) -> str:
    """Submits a script; returns the job's number."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True, timeout=120, check=False
        )
    except FileNotFoundError as error:
        raise UserError(
            "sbatch: got no such command; allowed is a machine from which jobs of Slurm are submitted; go to one, or "
            "look at the script with --dry-run"
        ) from error
    if done.returncode != 0:
        raise UserError(f"sbatch refuses {script}:\n{done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
