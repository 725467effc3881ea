"""Whole runs side by side: lanes, shortened plans, and the plans that the benchmarks name."""

import os
import sys
import threading
from functools import partial
from pathlib import Path

import patience
import pytest
import torch

from benchmarks import fillings, learning, plan_comparison, plan_runs, regimes, router_losses, sparse
from benchmarks.plan_runs import Finished, Lanes, PlanRun, run_on, run_plan, scaled_steps
from benchmarks.record import Options
from engine.plan.parse import load_plan
from omnivl.tasks.results import Score

CPU = torch.device("cpu")


def test_jobs_run_side_by_side_on_cores_of_their_own():
    with Lanes(CPU) as lanes:
        if lanes.count < 2:
            pytest.skip("needs two cores")
        both = threading.Barrier(2, timeout=patience.seconds(20))  # is passed only when two jobs run at once

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


def test_a_job_that_fails_is_told_before_anyone_waits_for_it(capfd):
    told = threading.Event()

    def fail(cores):
        try:
            raise RuntimeError("no such plan")
        finally:
            told.set()

    with Lanes(CPU) as lanes:
        failed, other = lanes.submit(fail), lanes.submit(lambda cores: told.wait(patience.seconds(20)))
        assert other.result()
    assert "no such plan" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="no such plan"):
        failed.result()


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"ended with 3:\nno such thing"):
        run_on(frozenset({0}), [sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"])


def test_a_command_sees_its_cores_only():
    one = frozenset({min(os.sched_getaffinity(0))})
    code = "import os, time; print(os.sched_getaffinity(0)); time.sleep(0.5)"
    done = run_on(one, [sys.executable, "-c", code])
    assert done.output.strip() == str(set(one))
    assert done.seconds > 0.5 > done.cpu_seconds > 0  # sleeping costs no core any time


def test_a_kept_run_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    started = list[str]()

    def ran(cores, command):
        started.append(command[command.index("--stage") + 1])
        if len(started) == 2:
            raise RuntimeError("ended from outside")
        return Finished("", 2.0, 1.0)

    monkeypatch.setattr(plan_runs, "run_on", ran)
    once = partial(
        run_plan, learning.PLAN, cores=frozenset({0}), stages=["spatial", "temporal"], folder=tmp_path / "kept"
    )
    with pytest.raises(RuntimeError, match="ended from outside"):
        once(["seed=1"])
    found = once(["seed=1"])
    assert started == ["spatial", "temporal", "temporal"]
    assert (found.seconds, found.cpu_seconds) == (4.0, 2.0), "of both stages, though one was run before"
    assert once(["seed=1", "stages.joint.steps=7"]) == found, "neither of the two descends from the third"
    with pytest.raises(RuntimeError, match=r"kept has a run of another plan \(stage temporal\): remove it"):
        once(["seed=1", "stages.temporal.steps=7"])


COMPARISONS = [regimes.COMPARISON, router_losses.COMPARISON, fillings.COMPARISON, sparse.COMPARISON]
PLANS = [learning.PLAN, *(comparison.plan for comparison in COMPARISONS)]


@pytest.mark.parametrize("plan", PLANS, ids=[plan.stem for plan in PLANS])
def test_shortened_plans_are_plans(plan):
    short = load_plan(plan, scaled_steps(plan, 0.01))
    whole = load_plan(plan)
    for stage, full in zip(short.stages, whole.stages, strict=True):
        assert stage.steps == max(2, round(full.steps * 0.01))
        assert stage.optimizer.warmup_steps <= stage.steps


@pytest.mark.parametrize("comparison", COMPARISONS, ids=[comparison.name for comparison in COMPARISONS])
def test_contenders_get_equally_much_and_are_measured_alike(comparison):
    stages = {stage.name: stage for stage in load_plan(comparison.plan).stages}
    contenders = comparison.contenders
    assert {stage for chain in contenders.values() for stage in chain} == set(stages)
    if comparison.equal == "steps":
        spent = {name: sum(stages[stage].steps for stage in chain) for name, chain in contenders.items()}
        assert len(set(spent.values())) == 1, spent
        assert len({stage.batch for stage in stages.values()}) == 1
    measured = [stages[chain[-1]].evaluate for chain in contenders.values()]
    assert measured[0].tasks
    assert all(each == measured[0] for each in measured)
    for chain in contenders.values():
        assert [stages[stage].init_from for stage in chain] == [None, *chain[:-1]]


def test_a_comparison_tables_scores_and_metrics_of_the_last_stages(monkeypatch):
    comparison = plan_comparison.Comparison(
        "name", "what", regimes.COMPARISON.plan, {"long": ("a", "b"), "short": ("c",)}, ("task R@1",), "long", ("m",)
    )
    values = {"a": 0.9, "b": 0.4, "c": 0.2}

    def run_plan(plan, overrides, cores, stages):
        seed = int(overrides[0].removeprefix("seed="))
        scores = {
            name: {"task R@1": Score("task", "R@1", values[name] + 0.01 * seed, 0.1, None, 10)} for name in stages
        }
        return PlanRun(scores, 2.0, 1.5, {name: {"m": 3.0} if name == "c" else {} for name in stages})

    monkeypatch.setattr(plan_comparison, "run_plan", run_plan)
    report = plan_comparison.compare(comparison, Options(CPU, 2, quick=False, out=Path()))
    (ratio,) = report.ratios
    assert ratio.name == "task R@1: long / short"
    assert ratio.value.median == pytest.approx(0.41 / 0.21)
    scores, metrics, seconds = report.tables
    assert scores.rows == [["task R@1", "0.410 (0.400 to 0.420)", "0.210 (0.200 to 0.220)", "0.100"]]
    assert metrics.rows == [["m", "-", "3.00 (3.00 to 3.00)"]]
    assert seconds.rows == [[str(seed), "2 / 2", "2 / 2"] for seed in range(3)]


def test_at_equal_time_the_quicker_contender_takes_more_steps(monkeypatch):
    contenders = {"slow": ("limoe",), "quick": ("dense",)}
    comparison = plan_comparison.Comparison(
        "name", "what", fillings.COMPARISON.plan, contenders, ("t R@1",), equal_time=True
    )
    asked = []

    def run_plan(plan, overrides, cores, stages):
        steps = [one for one in overrides if one.startswith(f"stages.{stages[0]}.steps=")]
        asked.append((stages[0], *steps))
        quick = stages == ("dense",)
        value = 0.5 if steps else 0.2
        scores = {stages[0]: {"t R@1": Score("t", "R@1", value, 0.1, None, 10)}}
        return PlanRun(scores, 9.0, 40.0 if quick and not steps else 60.0, {})

    monkeypatch.setattr(plan_comparison, "run_plan", run_plan)
    report = plan_comparison.compare(comparison, Options(CPU, 2, quick=False, out=Path()))
    assert sorted(asked) == sorted(
        [("limoe",), ("dense",), ("dense", "stages.dense.steps=750")] * 3
    )  # 500 steps, in 60 instead of 40 seconds
    equal, seconds, longer, spent = report.tables
    assert equal.rows == [["t R@1", "0.200 (0.200 to 0.200)", "0.200 (0.200 to 0.200)", "0.100"]]
    assert longer.rows == [["t R@1", "0.200 (0.200 to 0.200)", "0.500 (0.500 to 0.500)", "0.100"]]
    assert "quick 1.50 times" in longer.title
    assert seconds.rows[0] == ["0", "9 / 60", "9 / 40"]
    assert spent.rows[0] == ["0", "9 / 60", "9 / 60"]
