"""Whole runs side by side: lanes, shortened plans, and the plans that the benchmarks name."""

import os
import sys
import threading

import pytest
import torch

from benchmarks import learning, regimes
from benchmarks.plan_runs import Lanes, run_on, scaled_steps
from engine.plan_parse import load_plan

CPU = torch.device("cpu")


def test_jobs_run_side_by_side_on_cores_of_their_own():
    with Lanes(CPU) as lanes:
        if lanes.count < 2:
            pytest.skip("needs two cores")
        both = threading.Barrier(2, timeout=20)  # is passed only when two jobs run at once

        def job(cores):
            both.wait()
            return cores

        found = [lanes.submit(job) for _ in range(4)]
        cores = [future.result() for future in found]
    assert all(len(each) == lanes.cores_of_each for each in cores)
    assert len(set(cores)) == 2
    assert not frozenset.intersection(*set(cores))


def test_a_job_may_wait_for_an_earlier_one():
    with Lanes(CPU) as lanes:
        first = [lanes.submit(lambda cores, number=number: number) for number in range(3)]
        second = [lanes.submit(lambda cores, earlier=earlier: earlier.result() + 10) for earlier in first]
        assert [future.result() for future in second] == [10, 11, 12]


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"ended with 3:\nno such thing"):
        run_on(frozenset({0}), [sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"])


def test_a_command_sees_its_cores_only():
    one = frozenset({min(os.sched_getaffinity(0))})
    printed, seconds = run_on(one, [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"])
    assert printed.strip() == str(set(one))
    assert seconds > 0


@pytest.mark.parametrize("plan", [learning.PLAN, regimes.PLAN], ids=["emoji", "regimes"])
def test_shortened_plans_are_plans(plan):
    short = load_plan(plan, scaled_steps(plan, 0.01))
    whole = load_plan(plan)
    for stage, full in zip(short.stages, whole.stages, strict=True):
        assert stage.steps == max(2, round(full.steps * 0.01))
        assert stage.optimizer.warmup_steps <= stage.steps


def test_the_regimes_spend_equal_steps_on_equal_batches_and_are_measured_alike():
    stages = {stage.name: stage for stage in load_plan(regimes.PLAN).stages}
    spent = {regime: sum(stages[name].steps for name in names) for regime, names in regimes.REGIMES.items()}
    assert len(set(spent.values())) == 1, spent
    assert {name for names in regimes.REGIMES.values() for name in names} == set(stages)
    assert len({stage.batch for stage in stages.values()}) == 1
    measured = [stages[names[-1]].evaluate for names in regimes.REGIMES.values()]
    assert measured[0].tasks
    assert all(each == measured[0] for each in measured)
    for names in regimes.REGIMES.values():
        assert [stages[name].init_from for name in names] == [None, *names[:-1]]
