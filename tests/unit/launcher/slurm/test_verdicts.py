"""Judgements of a job: who failed first, which node is bad, whether it starts again."""

import os
import signal
from pathlib import Path

import pytest

from launcher.slurm.blame import FailedRank, describe_code, exit_code, first_failure, lost_nodes
from launcher.slurm.control import describe_job, was_cancelled, was_preempted
from launcher.slurm.restarts import Restarts, judge
from launcher.slurm.verdicts import NodeReport, bad_nodes, read_reports, unexplained, write_report


def test_killed_task_is_to_blame_rather_than_those_it_took_along() -> None:
    messages = [
        (10.0, "srun: error: n1: tasks 0-1: Exited with exit code 1"),
        (10.1, "srun: launch/slurm: _step_signal: Terminating StepId=3.0"),
        (10.4, "srun: error: n2: task 3: Killed"),
    ]
    assert first_failure(messages) == FailedRank(3, "n2", 137, "Killed")


def test_task_that_slurm_killed_later_is_not_to_blame() -> None:
    messages = [
        (10.0, "srun: error: n2: task 2: Exited with exit code 1"),
        (40.2, "srun: error: n1: tasks 0-1: Killed"),
    ]
    assert first_failure(messages) == FailedRank(2, "n2", 1, "Exited with exit code 1")


def test_task_that_srun_ended_with_the_others_is_not_to_blame() -> None:
    messages = [
        (10.0, "srun: error: n2: task 1: Exited with exit code 138"),
        (10.2, "srun: error: n1: task 0: Terminated"),
    ]
    assert first_failure(messages) == FailedRank(1, "n2", 138, "Exited with exit code 138")


def test_signals_and_codes_of_tasks() -> None:
    def code(what: str) -> int:
        failure = first_failure([(0.0, f"srun: error: gpu-7: task 12: {what}")])
        assert failure is not None and (failure.rank, failure.node) == (12, "gpu-7")
        return failure.code

    assert code("Segmentation fault (core dumped)") == 128 + signal.SIGSEGV
    assert code("User defined signal 1") == 128 + signal.SIGUSR1
    assert code("Exited with exit code 138") == 138
    assert code("Exited with exit code 247") == 137, "deepspeed's launcher: -9 in one byte"
    assert code("Out Of Memory") == 137
    assert first_failure([(0.0, "srun: Job step creation temporarily disabled, retrying")]) is None


def test_codes_in_sruns_words() -> None:
    assert describe_code(137) == "Killed"
    assert describe_code(2) == "Exited with exit code 2"


def test_lost_nodes() -> None:
    messages = [(1.0, "srun: error: n1: task 0: Exited with exit code 1"), (9.0, "srun: error: Node failure on n[2-3]")]
    assert lost_nodes(messages) == ["n2", "n3"]
    assert lost_nodes(messages[:1]) == []


def test_exit_codes() -> None:
    assert [exit_code(code) for code in (0, 1, 75, 138, 143, 247, -9)] == [0, 1, 75, 138, 143, 137, 137]


def test_nodes_with_problems_of_their_own_excuse_the_others() -> None:
    reports = {
        "n1": NodeReport("n1", (), 100.0, error="Connection reset"),
        "n2": NodeReport("n2", ("7 of 8 GPUs are visible",), 100.0),
    }
    assert bad_nodes(reports, ["n1", "n2", "n3"], 5.0) == {"n2": "7 of 8 GPUs are visible"}
    assert bad_nodes({"n1": reports["n1"]}, ["n1", "n3"], 5.0) == {"n3": "gave no answer"}


def test_sum_that_fails_everywhere_names_no_node() -> None:
    failed = {name: NodeReport(name, (), 100.0, error="Timed out") for name in ("n1", "n2")}
    assert bad_nodes(failed, ["n1", "n2"], 5.0) == {}
    assert unexplained(failed) == "Timed out"
    one = {**failed, "n2": NodeReport("n2", (), 100.0, together=101.0)}
    assert bad_nodes(one, ["n1", "n2"], 5.0) == {"n1": "sum over all nodes: Timed out"}


def test_clock_that_is_off() -> None:
    clocks = {name: NodeReport(name, (), 0.0, together=when) for name, when in (("a", 50.0), ("b", 50.2), ("c", 57.0))}
    assert bad_nodes(clocks, ["a", "b", "c"], 5.0) == {"c": "its clock is +6.8 s off"}
    assert bad_nodes(clocks, ["a", "b", "c"], 10.0) == {}


def test_reports_survive_the_disk(tmp_path: Path) -> None:
    report = NodeReport("n1", ("one", "two"), 1.5, together=2.5)
    write_report(tmp_path, report)
    assert read_reports(tmp_path, ["n1", "n2"]) == {"n1": report}


@pytest.mark.parametrize(
    ("code", "bad", "verdict"),
    [
        *((0, 0, "done"), (138, 0, "again"), (143, 0, "again"), (137, 0, "again"), (75, 0, "again")),
        *((1, 0, "failed"), (1, 1, "again"), (2, 0, "failed")),
    ],
)
def test_what_is_started_again(code: int, bad: int, verdict: str) -> None:
    assert judge(code, bad)[0] == verdict


def test_job_is_given_up_after_starts_without_a_step_more(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path / "slurm" / "starts.jsonl", 12, limit=2)
    assert restarts.refusal(0) is None
    for restart, steps in enumerate((0, 100, 100, 100)):
        assert restarts.refusal(steps) is None
        restarts.note(restart, steps)
    assert restarts.refusal(150) is None, "a step more clears the count"
    assert restarts.refusal(100) == (
        "job 12 was started 3 times at step 100 and saved no step more; it is not started again "
        "(restarts_without_progress in the cluster's file). Save more often (checkpoint.every), ask for more time, or "
        "see the logs of its starts"
    )
    other = Restarts(tmp_path / "slurm" / "starts.jsonl", 13, limit=0)
    assert other.refusal(100) is None, "another job of the same run starts anew"


def test_fields_of_a_job_are_slurms_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment may look like a field; Slurm's own come before it."""
    shown = "JobId=3 JobName=x JobState=RUNNING PreemptTime=None ExcNodeList=(null) Comment=a JobState=CANCELLED"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fields = describe_job(3)
    assert (fields["JobState"], fields["ExcNodeList"]) == ("RUNNING", "(null)")
    assert not was_cancelled(fields) and not was_preempted(fields)
    assert was_cancelled({**fields, "JobState": "COMPLETING"})
    assert was_preempted({**fields, "PreemptTime": "2026-01-01T12:00:00"})
