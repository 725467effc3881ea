"""Time left and smoothed losses, for the console."""

import time
from collections.abc import Mapping

_SMOOTHING = 0.95


class Clock:
    """Time left, from the pace since the run started or was resumed.

    Other stages are assumed to go at the pace of the present one, as nothing better is known before they start.
    """

    def __init__(self, stage_steps: Mapping[int, int]) -> None:
        """Takes the number of steps of each stage by index."""
        self._stage_steps = dict(stage_steps)
        self._stage = 0
        self._first_step = 0
        self._began = time.perf_counter()

    def begin(self, stage: int, done: int) -> None:
        """A stage starts at step ``done``."""
        self._stage, self._first_step, self._began = stage, done, time.perf_counter()

    def left(self, step: int) -> tuple[float | None, float | None]:
        """Seconds left for the stage and for the run; None before the first step."""
        if step <= self._first_step:
            return None, None
        pace = (time.perf_counter() - self._began) / (step - self._first_step)
        here = pace * (self._stage_steps[self._stage] - step)
        later = sum(steps for stage, steps in self._stage_steps.items() if stage > self._stage)
        return here, here + pace * later


class SmoothedLosses:
    """Exponential moving averages of losses, corrected for the bias of the first steps."""

    def __init__(self, smoothing: float = _SMOOTHING) -> None:
        """Takes the decay of the average."""
        self._smoothing = smoothing
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, losses: Mapping[str, float]) -> None:
        """Adds the losses of one step; those that are not finite are left out."""
        for name, loss in losses.items():
            if loss - loss == 0.0:
                total, weight = self._sums.get(name, (0.0, 0.0))
                kept = self._smoothing
                self._sums[name] = (kept * total + (1 - kept) * loss, kept * weight + (1 - kept))

    @property
    def means(self) -> dict[str, float]:
        """The smoothed losses."""
        return {name: total / weight for name, (total, weight) in self._sums.items()}


def duration(seconds: float | None) -> str:
    """``1 h 02 min``, ``3 min 20 s``, ``7 s``; ``?`` for None."""
    if seconds is None:
        return "?"
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
