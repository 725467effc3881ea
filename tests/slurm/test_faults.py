"""Faults of a cluster: preempted nodes, nodes that fail, nodes that are bad from the beginning."""

from typing import TYPE_CHECKING

import pytest
from conftest import assert_equal_runs

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]

TWO_NODES = ("--nodes", "2", "--processes-per-node", "1")


@pytest.mark.full
def test_preempted_run_goes_on_and_equals_one_left_alone(cluster: "Cluster") -> None:
    whole, preempted = cluster.folder / "whole", cluster.folder / "preempted"
    plan = ("stages.spatial.steps=30", "loader.num_workers=1")  # TERM gets to data workers, too
    (first,) = cluster.submit(preempted, *TWO_NODES, "--partition", "low", *plan)
    cluster.wait_for_step(first, preempted, 2)
    with cluster.held(preempted):
        (other,) = cluster.submit(whole, *TWO_NODES, "--partition", "main", "--sbatch", "exclusive", *plan)
    cluster.finish(other, whole)
    log = cluster.finish(first, preempted)
    assert "another job takes the nodes: back into the queue at step" in log
    assert "start 1 on n1, n2, at step" in log and "start 1 on n1, n2, at step 0" not in log
    assert int(cluster.lab.job(first)["Restarts"]) == 1
    assert_equal_runs(whole, preempted)


@pytest.mark.full
def test_run_goes_on_after_a_node_has_died(cluster: "Cluster") -> None:
    whole, killed = cluster.folder / "whole", cluster.folder / "killed"
    steps = ("stages.spatial.steps=30", "checkpoint.every=4")
    (job,) = cluster.submit(killed, *TWO_NODES, *steps)
    cluster.wait_for_step(job, killed, 5)
    cluster.kill_node(2)
    cluster.lab.wait_for(lambda: cluster.lab.job(job)["Restarts"] == "1", 90, "a job that waits again")
    cluster.lab.start_node(2)
    log = cluster.finish(job, killed)
    assert "Slurm has lost n2" in log and "failed first" not in log
    assert "start 1 on n1, n2, at step" in log and "start 1 on n1, n2, at step 0" not in log
    (other,) = cluster.submit(whole, *TWO_NODES, *steps)
    cluster.finish(other, whole)
    assert_equal_runs(whole, killed)


@pytest.mark.full
def test_cancelled_job_saves_and_is_not_started_again(cluster: "Cluster") -> None:
    run = cluster.folder / "run"
    plain = ("parallel.host=plain", "launch.processes=1", "stages.spatial.steps=300")
    (job,) = cluster.submit(run, *plain)
    cluster.wait_for_step(job, run, 2)
    cluster.cancel(job)
    log = cluster.finish(job, run, "CANCELLED")
    assert "the job is cancelled and has saved" in log
    assert list((run / "stages" / "01-spatial" / "checkpoints").glob("step-*"))
    (other,) = cluster.submit(run, *plain)
    cluster.wait_for_step(other, run, 4)
    assert "at step 0" not in cluster.log(other, run)


@pytest.mark.full
def test_bad_node_is_named_and_avoided(cluster: "Cluster") -> None:
    """A job of one node prefers n2, whose memory for data workers is full."""
    cluster.lab.on_node(2, "mount -o remount,ro /dev/shm")
    try:
        run = cluster.folder / "run"
        plain = ("parallel.host=plain", "launch.processes=1", "stages.spatial.steps=2")
        (job,) = cluster.submit(run, *plain, profile="checked")
        log = cluster.finish(job, run)
    finally:
        cluster.lab.on_node(2, "mount -o remount,rw /dev/shm")
    assert "start 0 on n2, at step 0" in log
    assert "node n2 is bad: /dev/shm cannot be written (Read-only file system)" in log
    assert "a node is bad: back into the queue at step 0, without n2" in log
    assert "start 1 on n1, at step 0" in log
    assert cluster.lab.job(job)["ExcNodeList"] == "n2"


@pytest.mark.full
def test_run_that_gets_nowhere_is_given_up(cluster: "Cluster") -> None:
    """A node check that no node passes: each start gets the job one node less, until its restarts are used up."""
    file = cluster.folder / "checked.yaml"
    file.write_text(file.read_text().replace("free_gib: 0.1", "free_gib: 1e9") + "restarts_without_progress: 1\n")
    run = cluster.folder / "run"
    plain = ("parallel.host=plain", "launch.processes=1", "stages.spatial.steps=2")
    (job,) = cluster.submit(run, *plain, profile="checked")
    log = cluster.finish(job, run, "FAILED")
    assert "GiB free, less than check.free_gib (1e+09)" in log
    assert f"job {job} was started 2 times at step 0 and saved no step more" in log
    assert "start 2" not in log
