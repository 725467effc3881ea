"""Runs on a real Slurm of two nodes: from ``omnivl submit`` to the end, and what a job survives."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from conftest import assert_equal_runs

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

NASTY = "a b'c\"d $(touch pwned) `touch pwned` ; touch pwned #"


def test_stopped_run_goes_on_and_equals_one_left_alone(cluster: "Cluster") -> None:
    """Two nodes under ZeRO-3, names that a shell would run, and USR1 in the middle, which gets to data workers too."""
    whole, stopped = cluster.folder / NASTY / "whole", cluster.folder / NASTY / "stopped"
    whole.parent.mkdir()
    (cluster.folder / "plan.yaml").rename(whole.parent / "pl an.yaml")
    cluster.plan = whole.parent / "pl an.yaml"
    layout = ("--nodes", "2", "--processes-per-node", "1", "loader.num_workers=1", "stages.spatial.steps=30")
    (first,) = cluster.submit(whole, *layout, profile="checked")
    (second,) = cluster.submit(stopped, *layout)
    cluster.wait_for_step(second, stopped, 2)
    with cluster.held(stopped):
        rows = {row["run"]: row for row in json.loads(cluster.omnivl("jobs", str(whole), str(stopped), "--json"))}
        row = rows[str(stopped)]
        assert (row["job"], row["state"], row["stage"], row["steps"]) == (second, "RUNNING", "spatial", 30)
        assert row["step"] >= 2 and row["samples_per_second"] > 0 and row["end"] is not None
        cluster.cancel(second, "--signal=USR1", "--batch")
    log = cluster.finish(second, stopped)
    assert "asked to save (USR1), and goes on from its checkpoint: back into the queue at step" in log
    assert "start 1 on n1, n2, at step" in log
    assert "start 1 on n1, n2, at step 0" not in log
    cluster.finish(first, whole)
    assert_equal_runs(whole, stopped)
    assert not list(cluster.folder.rglob("pwned")) and not Path("pwned").exists()
    assert "COMPLETED" in cluster.omnivl("jobs", str(whole))


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_killed_rank_is_named(cluster: "Cluster", launcher: str) -> None:
    run = cluster.folder / "run"
    (cluster.folder / "cluster.yaml").write_text(
        (cluster.folder / "cluster.yaml").read_text() + "restarts_without_progress: 0\n"
    )
    layout = ("--nodes", "2", "--processes-per-node", "1", "--launcher", launcher)
    (job,) = cluster.submit(run, "stages.spatial.steps=400", *layout)
    cluster.wait_for_step(job, run, 2)
    cluster.kill_rank(run, 1)
    log = cluster.finish(job, run, "FAILED")
    assert "rank 1 on n2 failed first: Killed" in log
    assert "a rank was ended by SIGKILL; job" in log and "was started once at step 0" in log
    assert cluster.lab.job(job)["ExitCode"] == "137:0"


SWEEP = """
name: seeds
plan: plan.yaml
overrides: {parallel.host: plain, launch.processes: 1, stages.spatial.steps: 2}
axes:
  seed: [1, 2]
  source: {good: {}, bad: {stages.spatial.data.0.where: {style: [nowhere]}}}
exclude: [{seed: 2, source: bad}]
"""


def test_sweep_is_a_job_array_that_is_resumed(cluster: "Cluster") -> None:
    """Runs that are done are not submitted again; one that failed says why on the page."""
    file, runs = cluster.folder / "s.yaml", cluster.folder / "runs"
    file.write_text(SWEEP)
    command = ("sweep", "run", str(file), "--on", "slurm", "--folder", str(runs), "--time", "10:00")
    arguments = (*command, "--cluster", str(cluster.folder / "cluster.yaml"), "--offline")  # one run is to fail
    told = cluster.omnivl(*arguments, "--sbatch", "hold")
    assert "seeds: 3 of 3 runs to submit" in told
    job = told.split("job ")[1].split(":")[0]
    cluster.tell(f"submitted the array {job} of a sweep")
    assert "0 of 3 runs to submit, 3 submitted before" in cluster.omnivl(*arguments)
    cluster.lab.run("scontrol", "release", job)
    for index in range(3):
        cluster.lab.wait_for(lambda index=index: cluster.ended(f"{job}_{index}"), 120, f"task {index}")
    rows = {Path(row["run"]).name: row["state"] for row in json.loads(cluster.omnivl("jobs", str(runs), "--json"))}
    assert rows == {
        "seed-1_source-good": "COMPLETED",
        "seed-1_source-bad": "FAILED",
        "seed-2_source-good": "COMPLETED",
    }
    assert "seeds: 1 of 3 runs to submit" in cluster.omnivl(*arguments)
    cluster.omnivl("sweep", "report", str(file), "--folder", str(runs))
    table = pd.read_parquet(runs / "sweep.parquet").set_index("run")
    assert table.loc["seed-1_source-good", "state"] == "complete"
