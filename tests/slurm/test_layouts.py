"""Layouts over two nodes of two ranks, each against the same layout on one machine; jobs that wait for each other."""

from typing import TYPE_CHECKING

import pytest
import torch
from conftest import PLAN, assert_equal_runs, final_state

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]

TWO_BY_TWO = ("--nodes", "2", "--processes-per-node", "2")
PIPELINE = ("parallel.host=pipeline", "parallel.zero_stage=1", "parallel.pipeline_stages=2")


@pytest.mark.parametrize("launcher", ["srun", pytest.param("deepspeed", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("parallel.zero_stage=3",), id="zero3"),
        pytest.param(PIPELINE, id="pipeline", marks=pytest.mark.full),
    ],
)
def test_two_nodes_equal_one_machine(cluster: "Cluster", launcher: str, layout: tuple[str, ...]) -> None:
    here, there = cluster.folder / "here", cluster.folder / "there"
    steps = ("stages.spatial.steps=4",)
    (job,) = cluster.submit(there, *TWO_BY_TWO, "--launcher", launcher, *layout, *steps)
    cluster.finish(job, there)
    cluster.omnivl("pretrain", str(cluster.plan), "--run-folder", str(here), "launch.processes=4", *layout, *steps)
    one, other = final_state(here), final_state(there)
    assert [record["step"] for record in other["metrics"]] == [1, 2, 3, 4]
    for before, after in zip(one["metrics"], other["metrics"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    for name, weights in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_deepspeed_launcher_passes_usr1_on(cluster: "Cluster") -> None:
    """The launcher itself knows no USR1."""
    whole, stopped = cluster.folder / "whole", cluster.folder / "stopped"
    layout = ("--nodes", "2", "--processes-per-node", "1", "--launcher", "deepspeed", "stages.spatial.steps=30")
    (job,) = cluster.submit(stopped, *layout)
    cluster.wait_for_step(job, stopped, 2)
    cluster.cancel(job, "--signal=USR1", "--batch")
    log = cluster.finish(job, stopped)
    assert "asked to save (USR1), and goes on from its checkpoint: back into the queue at step" in log
    (other,) = cluster.submit(whole, *layout)
    cluster.finish(other, whole)
    assert_equal_runs(whole, stopped)


def test_stages_as_a_chain_of_jobs(cluster: "Cluster") -> None:
    head, _, stage = PLAN.partition("stages:\n")
    second = stage.replace("name: spatial", "name: again\n    init_from: spatial")
    cluster.write_plan(f"{head}stages:\n{stage}{second}")
    run = cluster.folder / "run"
    plain = ("parallel.host=plain", "launch.processes=1")
    steps = ("stages.spatial.steps=2", "stages.again.steps=2")
    first, then = cluster.submit(run, *plain, *steps, "--chain")
    assert cluster.lab.job(then)["Dependency"] == f"afterok:{first}(unfulfilled)"
    cluster.finish(then, run)
    assert cluster.lab.job(first)["JobState"] == "COMPLETED"
    assert [final_state(run, name)["metrics"][-1]["step"] for name in ("01-spatial", "02-again")] == [2, 2]


@pytest.mark.full
def test_stages_behind_a_failed_one_do_not_start(cluster: "Cluster") -> None:
    head, _, stage = PLAN.partition("stages:\n")
    second = stage.replace("name: spatial", "name: again\n    init_from: spatial")
    missing = stage.replace("source: emoji", "source: nowhere/nothing.tar").replace(
        ", where: {split: [train], style: [fluent]}", ""
    )
    cluster.write_plan(f"{head}stages:\n{missing}{second}")
    run = cluster.folder / "run"
    # Without the look, which would refuse the missing shards.
    first, then = cluster.submit(run, "parallel.host=plain", "launch.processes=1", "--chain", "--offline")
    log = cluster.finish(first, run, "FAILED")
    assert "nowhere/nothing.tar" in log and "the run failed with exit code 2" in log
    cluster.finish(then, run, "CANCELLED")
