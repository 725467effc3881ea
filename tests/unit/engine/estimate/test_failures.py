"""Runs with failures, against Young's and Daly's formulas and order statistics."""

import time
from dataclasses import replace

import numpy as np
import pytest

from engine.estimate.activities import StepActivities
from engine.estimate.events import Activity
from engine.estimate.failures import (
    Faults,
    daly_goodput,
    daly_interval,
    simulate_run,
    slowest,
    stretched_steps,
    sweep_intervals,
    young_interval,
)

DAYS = 86400.0
# 1,250 nodes (10,000 GPUs) that last 5,000 h each: a failure every four hours.
LARGE = Faults(node_hours=5000.0, nodes=1250, checkpoint_seconds=60.0, restart_seconds=600.0)


def test_intervals_by_hand() -> None:
    assert LARGE.mean_seconds == 14400
    assert young_interval(LARGE) == pytest.approx((2 * 60 * 14400) ** 0.5)
    ratio = 60 / (2 * 14400)
    by_hand = young_interval(LARGE) * (1 + ratio**0.5 / 3 + ratio / 9) - 60
    assert daly_interval(LARGE) == pytest.approx(by_hand)
    assert daly_interval(replace(LARGE, checkpoint_seconds=4 * 14400)) == 14400


def test_ten_thousand_devices_are_simulated_fast_and_come_out_as_expected() -> None:
    began = time.perf_counter()
    run = simulate_run(LARGE, daly_interval(LARGE), 3000 * DAYS, seed=1)
    assert time.perf_counter() - began < 5
    assert run.failures > 10_000
    assert run.goodput + run.checkpoints + run.lost + run.restarts == pytest.approx(1.0)
    assert run.goodput == pytest.approx(daly_goodput(LARGE, run.interval), rel=0.01)
    assert run == simulate_run(LARGE, daly_interval(LARGE), 3000 * DAYS, seed=1)


def test_dalys_interval_is_the_best_of_the_simulated_ones() -> None:
    best = daly_interval(LARGE)
    runs = sweep_intervals(LARGE, [best * 1.25**power for power in range(-8, 9)], 3000 * DAYS, seed=2)
    found = max(runs, key=lambda run: run.goodput)
    assert found.interval == pytest.approx(best, rel=0.3)  # the optimum is flat, two steps of the grid
    assert runs[8].goodput == pytest.approx(found.goodput, rel=0.002)
    assert found.goodput > runs[0].goodput and found.goodput > runs[-1].goodput


def test_no_checkpoint_is_ever_reached() -> None:
    hopeless = replace(LARGE, node_hours=0.001)
    assert daly_goodput(hopeless, 10_000.0) == 0.0
    assert simulate_run(hopeless, 10_000.0, 1000.0).goodput == 0.0


def test_the_slowest_of_many_is_drawn_at_once() -> None:
    draw = np.random.default_rng(0)
    faults = replace(LARGE, jitter=0.05)
    at_once = slowest(faults, 1000, 20_000, draw)
    one_by_one = np.exp(0.05 * draw.standard_normal((20_000, 1000)).max(1))
    assert at_once.mean() == pytest.approx(one_by_one.mean(), rel=1e-3)
    assert np.quantile(at_once, 0.9) == pytest.approx(np.quantile(one_by_one, 0.9), rel=2e-3)


def test_few_slow_devices_slow_all() -> None:
    faults = replace(LARGE, slow_share=1e-4, slow_factor=1.5)
    factors = slowest(faults, 10_000, 4000, np.random.default_rng(0))
    # All are fast in (1 - 1e-4) ** 10,000 = 36.8 % of the steps.
    assert set(np.unique(factors)) == {1.0, 1.5}
    assert (factors == 1.0).mean() == pytest.approx(0.368, abs=0.03)


def test_a_stretched_step_waits_for_its_slowest_device() -> None:
    activities = StepActivities(
        activities=[Activity("0/compute", 2.0, (), "work"), Activity("0/link", 1.0, (0,), "reduction")]
    )
    steps = stretched_steps(activities, replace(LARGE, slow_share=1.0, slow_factor=1.5), replicas=8, steps=3)
    assert steps == pytest.approx([4.0, 4.0, 4.0])
    assert stretched_steps(activities, LARGE, replicas=8, steps=2) == pytest.approx([3.0, 3.0])
