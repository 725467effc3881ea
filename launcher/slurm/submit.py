"""``omnivl submit``: writes a job for Slurm and hands it in."""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from engine.plan import Plan
from engine.plan_parse import load_plan
from launcher.local import local_processes
from launcher.slurm.profile import ClusterProfile, load_profile
from launcher.slurm.script import OptionValue, check_options, job_name, job_script, log_pattern
from launcher.slurm.spec import JobSpec, RunTask
from launcher.slurm.sweep import combinations
from omnivl.errors import UserError

CLUSTER = "OMNIVL_CLUSTER"


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


def submit(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value, e.g. stages.joint.optimizer.lr=2e-4", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs on each node, and as many ranks; 0 trains on CPUs.")
    ] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node, where they are not as many as GPUs.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="sbatch's --partition.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time", help="sbatch's --time, e.g. 24:00:00.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Any other option of sbatch, e.g. account=vision or exclusive.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(envvar=CLUSTER, help="The cluster's file; see configs/clusters/.")
    ] = None,
    launcher: Annotated[str | None, typer.Option(help="srun or deepspeed; the cluster's by default.")] = None,
    run_folder: Annotated[
        Path | None, typer.Option(help="Where the run is written; runs/NAME of the plan by default.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Run this stage only.")] = None,
    chain: Annotated[bool, typer.Option("--chain", help="A job for each stage, each after the one before.")] = False,
    vary: Annotated[
        list[str] | None, typer.Option(help="A job array over path=[value, value]; several give all combinations.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier start left in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print the script only.")] = False,
) -> None:
    """Writes a job that runs a plan on a Slurm cluster, and submits it. It goes on by itself when it is cut off."""
    profile = _with_launcher(load_profile(cluster), launcher)
    check_options(profile.sbatch, f"{cluster}: sbatch")
    given = _options(sbatch or (), partition, time_limit)
    check_options(given, "--sbatch")
    gpus = profile.gpus_per_node or 0 if gpus_per_node is None else gpus_per_node
    read = load_plan(plan, overrides or ())
    processes = processes_per_node or local_processes(read.launch.processes, gpus)
    world = nodes * processes
    runs = [load_plan(plan, [*(overrides or ()), *varied], world) for varied in combinations(vary or ())]
    folder = (run_folder or Path("runs") / read.name).resolve()
    options = {**_header(nodes, processes, gpus, profile), **profile.sbatch, **given}
    stages = _stages(read, stage, chain)
    written = folder / "slurm" / time.strftime("submitted-%Y%m%d-%H%M%S")
    submissions = [
        _write(
            runs,
            folder,
            written,
            options,
            JobSpec((), nodes, processes, gpus, profile, name, fresh and index == 0),
            array=bool(vary),
        )
        for index, name in enumerate(stages)
    ]
    if dry_run:
        for submission in submissions:
            typer.echo(submission.script.read_text(), nl=False)
            typer.echo(f"# not submitted; written: {submission.script}")
        return
    _submit_all(submissions, folder)


def _submit_all(submissions: Sequence[Submission], folder: Path) -> None:
    """Hands the jobs in, each to start after the one before has ended well, and says where to look."""
    before: str | None = None
    for submission in submissions:
        after = [] if before is None else [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
        before = _sbatch(submission.script, after)
        folders = [str(path) for path in submission.folders]
        record = {"job": int(before), "stage": submission.stage, "time": time.time(), "folders": folders}
        with (folder / "slurm" / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        what = "" if submission.stage is None else f", stage {submission.stage}"
        log = submission.log.replace("%j", before).replace("%A", before).replace("%a", "*")
        typer.echo(f"job {before}{what}: {log}")
    typer.echo(f"state and progress: omnivl jobs {folder}")


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


def _write(
    runs: Sequence[Plan],
    folder: Path,
    written: Path,
    options: Mapping[str, OptionValue],
    spec: JobSpec,
    *,
    array: bool,
) -> Submission:
    """Writes plans, specification and script of one job."""
    name = "job" if spec.stage is None else f"job-{spec.stage}"
    folders = tuple(folder / f"{index:03d}" if array else folder for index in range(len(runs)))
    log = log_pattern(folder, "slurm/%A_%a.log" if array else "slurm/%j.log")
    options = {"job-name": job_name(runs[0].name), **options, "output": log}
    if array:
        options["array"] = f"0-{len(runs) - 1}"
    text = job_script(options, spec.profile, written / f"{name}.json")
    written.mkdir(parents=True, exist_ok=True)
    tasks = []
    for index, (run, place) in enumerate(zip(runs, folders, strict=True)):
        file = written / (f"plan-{index:03d}.yaml" if array else "plan.yaml")
        file.write_text(run.to_yaml(), encoding="utf-8")
        tasks.append(RunTask(str(file), str(place)))
    JobSpec(**{**vars(spec), "tasks": tuple(tasks)}).write(written / f"{name}.json")
    script = written / f"{name}.sh"
    script.write_text(text, encoding="utf-8")
    return Submission(script, spec.stage, folders, log)


def _header(nodes: int, processes: int, gpus: int, profile: ClusterProfile) -> dict[str, OptionValue]:
    """The options that follow from what was asked."""
    options: dict[str, OptionValue] = {
        "nodes": nodes,
        "ntasks-per-node": processes,
        "requeue": True,
        "open-mode": "append",
        "signal": f"B:USR1@{profile.grace_seconds}",
    }
    if gpus and "gres" not in profile.sbatch:
        options["gpus-per-node"] = gpus
    return options


def _options(sbatch: Sequence[str], partition: str | None, time_limit: str | None) -> dict[str, OptionValue]:
    options: dict[str, OptionValue] = {}
    for text in sbatch:
        name, equals, value = text.removeprefix("--").partition("=")
        options[name] = value if equals else True
    options |= {} if partition is None else {"partition": partition}
    options |= {} if time_limit is None else {"time": time_limit}
    return options


def _with_launcher(profile: ClusterProfile, launcher: str | None) -> ClusterProfile:
    if launcher is None:
        return profile
    if launcher not in ("srun", "deepspeed"):
        raise UserError(f"--launcher: got {launcher!r}; allowed are srun and deepspeed; name one of them")
    return ClusterProfile(**{**vars(profile), "launcher": launcher})


def _stages(plan: Plan, stage: str | None, chain: bool) -> list[str | None]:
    """The stage of each job; None runs all of them."""
    names = [entry.name for entry in plan.stages]
    if stage is not None and chain:
        raise UserError(f"--stage: got {stage!r} together with --chain, which runs all stages; leave one of them out")
    if stage is not None and stage not in names:
        raise UserError(f"--stage: got {stage!r}; allowed are {', '.join(names)}; name one of them")
    return [*names] if chain else [stage]
