"""Time that a long run on many machines loses through slow devices, failing nodes, and checkpoints.

Letters: M mean seconds between failures of the whole run, D seconds of a checkpoint, R seconds to start again, T
seconds of training between two checkpoints, n devices.

Source: Young, A first order approximation to the optimum checkpoint interval, 1974; Daly, A higher order estimate of
the optimum checkpoint interval for restart dumps, 2006 (recalled, not read anew).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine.estimate.activities import StepActivities

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Faults:
    """What goes wrong.

    Attributes:
        node_hours: Mean hours until a node fails.
        nodes: How many.
        checkpoint_seconds: D.
        restart_seconds: R: until the run is back at its newest checkpoint, including the wait for a node.
        jitter: Standard deviation of the logarithm of a device's speed, drawn anew for each step.
        slow_share: Share of the devices that are slow in a step.
        slow_factor: How many times as long they compute.
    """

    node_hours: float
    nodes: int
    checkpoint_seconds: float
    restart_seconds: float
    jitter: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0

    @property
    def mean_seconds(self) -> float:
        """M."""
        return self.node_hours * 3600 / self.nodes


@dataclass(frozen=True)
class Goodput:
    """The result of a simulated run.

    Attributes:
        interval: Seconds of training between checkpoints.
        goodput: Share of the time that went into steps that were kept.
        checkpoints: Share that went into checkpoints.
        lost: Share that went into work that was lost.
        restarts: Share that went into starting again.
        failures: Number of failures.
    """

    interval: float
    goodput: float
    checkpoints: float
    lost: float
    restarts: float
    failures: int


def young_interval(faults: Faults) -> float:
    """``sqrt(2 D M)``: the best T where failures are rare."""
    return math.sqrt(2 * faults.checkpoint_seconds * faults.mean_seconds)


def daly_interval(faults: Faults) -> float:
    """The best T to a higher order; M where a checkpoint takes more than twice that."""
    ratio = faults.checkpoint_seconds / (2 * faults.mean_seconds)
    if ratio >= 1:
        return faults.mean_seconds
    return young_interval(faults) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - faults.checkpoint_seconds


def daly_goodput(faults: Faults, interval: float) -> float:
    """Expected share of useful time where failures come at random: ``T / (M exp(R/M) (exp((T + D)/M) - 1))``."""
    mean = faults.mean_seconds
    cycle = (interval + faults.checkpoint_seconds) / mean
    if cycle > 500:  # no checkpoint will ever be reached
        return 0.0
    return interval / (mean * math.exp(faults.restart_seconds / mean) * math.expm1(cycle))


def simulate_run(faults: Faults, interval: float, seconds: float, seed: int = 0) -> Goodput:
    """Simulates a run failure by failure; between two failures are cycles of training and a checkpoint.

    A failure loses the work since the last whole checkpoint. It can come while a checkpoint is written, or during a
    restart, which then begins again.

    Args:
        faults: Failures of all nodes together come at random, M apart in the mean.
        interval: T.
        seconds: How long to simulate; the run ends with the first failure after that.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    cycle = interval + faults.checkpoint_seconds
    useful = written = lost = restarting = 0.0
    failures = 0
    while useful + written + lost + restarting < seconds:
        for until in draw.exponential(faults.mean_seconds, 4096).tolist():
            started = 0.0 if failures == 0 else min(until, faults.restart_seconds)
            restarting += started
            cycles = math.floor((until - started) / cycle)
            useful += cycles * interval
            written += cycles * faults.checkpoint_seconds
            lost += until - started - cycles * cycle
            failures += 1
            if useful + written + lost + restarting >= seconds:
                break
    total = useful + written + lost + restarting
    return Goodput(interval, useful / total, written / total, lost / total, restarting / total, failures)


def sweep_intervals(faults: Faults, intervals: Sequence[float], seconds: float, seed: int = 0) -> list[Goodput]:
    """The same run, failure for failure, with other intervals."""
    return [simulate_run(faults, interval, seconds, seed) for interval in intervals]


def slowest(faults: Faults, devices: int, steps: int, draw: np.random.Generator) -> Floats:
    """How many times as long the slowest device takes, step by step, ``[steps]``; 1 without jitter and slow devices.

    The largest of n draws is computed from the n-th root of one uniform number: the cost does not depend on n.
    """
    fast = _largest(faults.jitter, devices, draw.random(steps))
    if faults.slow_share <= 0:
        return fast
    slow = draw.binomial(devices, faults.slow_share, steps)
    uniforms = draw.random(steps)
    among = [
        faults.slow_factor * float(_largest(faults.jitter, int(count), np.array([one]))[0]) if count else 0.0
        for count, one in zip(slow, uniforms, strict=True)
    ]
    behind: Floats = np.maximum(fast, among)
    return behind


def stretched_steps(built: StepActivities, faults: Faults, replicas: int, steps: int = 100, seed: int = 0) -> Floats:
    """Seconds of steps whose devices are not equally fast, ``[steps]``.

    Replicas wait for each other in every step, so that the slowest one counts; the pipeline stages are drawn
    separately.

    Args:
        built: A step's (``estimate_step(...).activities``).
        faults: Jitter and slow devices.
        replicas: Number of devices that do the same as each simulated one.
        steps: How many.
        seed: Of the draws.
    """
    draw = np.random.default_rng(seed)
    devices = sorted({activity.resource for activity in built.activities if activity.resource.endswith("/compute")})
    factors = {name: slowest(faults, replicas, steps, draw) for name in devices}
    if len(devices) == 1:  # interpolated: between two grid points the step is nearly linear in the factor
        name = devices[0]
        grid = np.linspace(1.0, max(1.0, float(factors[name].max())), 9)
        seconds = [built.seconds({name: float(factor)}) for factor in grid]
        read: Floats = np.interp(factors[name], grid, seconds)
        return read
    found = [built.seconds({name: float(factors[name][step]) for name in devices}) for step in range(steps)]
    return np.array(found)


def _largest(jitter: float, count: int, uniforms: Floats) -> Floats:
    """The largest of ``count`` lognormal draws of median 1, from one uniform number each."""
    if jitter <= 0:
        return np.ones_like(uniforms)
    normal = NormalDist()
    # log of the n-th root; keeps the upper tail where 1 - p is too small for a number near 1 to represent
    tails = -np.expm1(np.log(uniforms) / count)
    quantiles = [-normal.inv_cdf(min(max(float(tail), 1e-300), 1 - 1e-16)) for tail in tails]
    drawn: Floats = np.exp(jitter * np.array(quantiles))
    return drawn
