"""``omnivl submit`` and ``omnivl jobs`` with replacements of Slurm's commands, which record their arguments."""

import datetime
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.plan.parse import load_plan
from launcher.cli import app
from launcher.slurm.allocation import Allocation
from launcher.slurm.deepspeed_node import command
from launcher.slurm.progress import read_progress, saved_steps, seconds_left
from launcher.slurm.queue import job_rows, submitted
from launcher.slurm.spec import read_spec
from launcher.slurm.steps import training_step, worker_arguments

ROOT = Path(__file__).parents[4]
PLAN = ROOT / "configs" / "plans" / "quickstart.yaml"


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that notes its arguments, one line for each call, and answers with the number of the line."""
    commands, calls = tmp_path / "bin", tmp_path / "calls"
    commands.mkdir()
    stand_in = commands / "sbatch"
    stand_in.write_text(f'#!/bin/bash\n(IFS="|"; echo "$*" >> "{calls}")\necho "$(wc -l < "{calls}");cluster"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return calls


def omnivl(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_dry_run_writes_but_does_not_submit(sbatch: Path, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    told = omnivl(
        *("submit", str(PLAN), "--nodes", "2", "--gpus-per-node", "2", "--partition", "gpu", "--time", "24:00:00"),
        *("--sbatch", "account=vision", "--sbatch", "exclusive", "--run-folder", str(run), "--dry-run"),
    )
    assert not sbatch.exists()
    (script,) = run.glob("slurm/submitted-*/job.sh")
    assert told == f"{script.read_text()}# not submitted; written: {script}\n"
    header = [line.removeprefix("#SBATCH --") for line in told.splitlines() if line.startswith("#SBATCH")]
    assert header == [
        *("job-name=quickstart", "nodes=2", "ntasks-per-node=2", "requeue", "open-mode=append", "signal=B:USR1@120"),
        *("gpus-per-node=2", "account=vision", "exclusive", "partition=gpu", "time=24:00:00"),
        f'output="{run}/slurm/%j.log"',
    ]
    spec = read_spec(script.with_suffix(".json"))
    assert (spec.nodes, spec.processes_per_node, spec.gpus_per_node, spec.fresh) == (2, 2, 2, False)
    assert load_plan(spec.tasks[0].plan, (), 4) == load_plan(PLAN, (), 4)


def test_chain_waits_stage_by_stage(sbatch: Path, tmp_path: Path) -> None:
    told = omnivl("submit", str(PLAN), "--chain", "--fresh", "--run-folder", str(tmp_path / "run"))
    calls = [line.split("|") for line in sbatch.read_text().splitlines()]
    assert [call[:-1] for call in calls] == [
        ["--parsable"],
        ["--parsable", "--dependency=afterok:1", "--kill-on-invalid-dep=yes"],
        ["--parsable", "--dependency=afterok:2", "--kill-on-invalid-dep=yes"],
    ]
    specs = [read_spec(Path(call[-1]).with_suffix(".json")) for call in calls]
    assert [(spec.stage, spec.fresh) for spec in specs] == [("spatial", True), ("temporal", False), ("joint", False)]
    assert f"job 2, stage temporal: {tmp_path}/run/slurm/2.log" in told
    assert worker_arguments(specs[0], specs[0].tasks[0], 0)[2:5] == ["--fresh", "--stage", "spatial"]
    assert worker_arguments(specs[0], specs[0].tasks[0], 1)[2:4] == ["--stage", "spatial"], "not after a restart"


SWEEP = """
name: s
plan: PLAN
axes:
  seed: [1, 2]
  where: {one: {}, three: {nodes: 3, launch.processes: 4}}
parallel: 5
"""


def test_a_sweep_is_an_array_for_each_shape(sbatch: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "s.yaml", tmp_path / "runs"
    file.write_text(SWEEP.replace("PLAN", str(PLAN)))
    told = omnivl("sweep", "run", str(file), "--on", "slurm", "--folder", str(run), "--partition", "gpu")
    assert "s: 4 of 4 runs to submit" in told
    small, large = (Path(line.split("|")[-1]) for line in sbatch.read_text().splitlines())
    assert [line.split("|")[:-1] for line in sbatch.read_text().splitlines()] == [["--parsable"]] * 2
    header = [line.removeprefix("#SBATCH --") for line in large.read_text().splitlines() if line.startswith("#SBATCH")]
    assert header == [
        *("job-name=s", "nodes=3", "ntasks-per-node=4", "requeue", "open-mode=append", "signal=B:USR1@120"),
        *("partition=gpu", f"output={run}/slurm/%A_%a.log", "array=0-1%5"),
    ]
    tasks = read_spec(large.with_suffix(".json")).tasks
    assert [load_plan(task.plan).seed for task in tasks] == [1, 2]
    assert [task.folder for task in tasks] == [str(run / f"seed-{seed}_where-three") for seed in (1, 2)]
    assert (read_spec(small.with_suffix(".json")).nodes, read_spec(small.with_suffix(".json")).processes_per_node) == (
        *(1, 2),
    )


def test_a_sweep_does_not_submit_what_slurm_still_has(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = tmp_path / "s.yaml", tmp_path / "runs"
    file.write_text(SWEEP.replace("PLAN", str(PLAN)))
    omnivl("sweep", "run", str(file), "--on", "slurm", "--folder", str(run))
    known = {"1_0": ("RUNNING", "n1"), "1_1": ("FAILED", ""), "2_0": ("PENDING", "Resources"), "2_1": ("TIMEOUT", "")}
    monkeypatch.setattr("launcher.slurm.sweep.queue", lambda: known)
    told = omnivl("sweep", "run", str(file), "--on", "slurm", "--folder", str(run), "--dry-run")
    assert told.count("array=0-1%5") == 2, "a dry run needs no Slurm"
    told = omnivl("sweep", "run", str(file), "--on", "slurm", "--folder", str(run))
    assert "s: 2 of 4 runs to submit, 2 submitted before" in told
    scripts = [Path(line.split("|")[-1]) for line in sbatch.read_text().splitlines()[2:]]
    names = [Path(task.folder).name for script in scripts for task in read_spec(script.with_suffix(".json")).tasks]
    assert names == ["seed-2_where-one", "seed-2_where-three"]


def test_a_sweep_over_nodes_is_refused_on_one_machine(sbatch: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(SWEEP.replace("PLAN", str(PLAN)))
    result = CliRunner().invoke(app, ["sweep", "run", str(file)])
    assert "got more than one node for seed-1_where-three, seed-2_where-three" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sbatch", "array=0-3"), "--sbatch: got the option 'array', which the job's script sets itself; use omnivl"),
        (("--stage", "second"), "--stage: got 'second'; allowed are spatial, temporal, joint"),
        (("--sbatch", "signal=USR2@3"), "--sbatch: got the option 'signal', which the job's script sets itself"),
        (("--launcher", "ssh"), "--launcher: got 'ssh'; allowed are srun and deepspeed"),
        (("--cluster", "none.yaml"), "--cluster: got none.yaml, which cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    sbatch: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, ["submit", str(PLAN), "--run-folder", str(tmp_path / "run"), *arguments])
    assert str(result.exception).startswith(message)
    assert not (tmp_path / "run").exists() and not sbatch.exists()


def test_plan_is_checked_for_the_ranks_of_the_job(sbatch: Path) -> None:
    arguments = ["submit", str(PLAN), "parallel.expert_parallel_size=3", "--nodes", "2", "--gpus-per-node", "2"]
    result = CliRunner().invoke(app, arguments)
    assert "expert_parallel_size" in str(result.exception) and not sbatch.exists()


def test_deepspeed_starts_one_task_on_each_node(sbatch: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    omnivl(
        "submit", str(PLAN), "--nodes", "2", "--gpus-per-node", "8", "--launcher", "deepspeed", "--run-folder", str(run)
    )
    (file,) = run.glob("slurm/submitted-*/job.json")
    step = training_step(read_spec(file), Allocation(7, 0, ("n1", "n2"), 0, 12077), tmp_path)
    assert step[:7] == [
        *("srun", "--export=ALL", "--input=none", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=2"),
        "--ntasks-per-node=1",
    ]
    assert step[-6:-1] == [str(tmp_path / "hostfile"), str(tmp_path), "--run-folder", str(run), "--"]
    assert (tmp_path / "hostfile").read_text() == "n1 slots=8\nn2 slots=8\n"
    line = command("H", "L", ["--", "p.yaml"], {"SLURM_NODEID": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "5"})
    assert line[2:] == [
        *("deepspeed.launcher.runner", "--no_ssh", "--hostfile", "H", "--node_rank", "1", "--master_addr", "n1"),
        *(
            "--master_port",
            "5",
            "--no_local_rank",
            "--enable_each_rank_log",
            "L",
            "--module",
            "launcher.start.supervisor",
        ),
        *("launcher.start.worker", "--", "p.yaml"),
    ]


def test_jobs_show_where_a_run_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages = {name: run / "stages" / f"{index + 1:02d}-{name}" for index, name in enumerate(("spatial", "temporal"))}
    for folder in stages.values():
        (folder / "checkpoints").mkdir(parents=True)
    (run / "plan.yaml").write_text("stages:\n- {name: spatial, steps: 100}\n- {name: temporal, steps: 50}\n")
    (stages["spatial"] / "complete.json").write_text('{"steps": 100}')
    (stages["temporal"] / "checkpoints" / "step-000010").mkdir()
    (stages["temporal"] / "checkpoints" / "step-000020.tmp").mkdir()
    line = {"step": 15, "event": "train", "speed": {"seconds_per_step": 2.0, "samples_per_second": 8.0}}
    (stages["temporal"] / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "slurm").mkdir()
    records = [{"job": 4, "stage": None, "folders": [str(run)]}, {"job": 5, "stage": "spatial", "folders": [str(run)]}]
    (run / "slurm" / "jobs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    assert saved_steps(run) == 110, "100 of a complete stage and 10 of a checkpoint that is whole"
    assert seconds_left(read_progress(run)) == 70.0
    now = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
    first, second = job_rows(submitted(run), {"4": ("RUNNING", "n[1-2]")}, now)
    assert (first.stage, first.step, first.steps, first.samples_per_second) == ("temporal", 15, 50, 8.0)
    assert (first.state, first.why, first.end) == ("RUNNING", "n[1-2]", "2026-01-01T12:01:10+00:00")
    assert (second.state, second.step, second.end) == ("COMPLETED", 100, None)
