"""Watches the losses of a stage: steps that are not finite, and losses above the band of recent ones.

A loss is an outlier above ``median + spike_factor * 1.4826 * MAD`` of the last ``spike_window`` good steps on the same
kinds of data, MAD being the median distance from the median (1.4826 of them are a standard deviation where losses are
normal). Steps on different kinds of data train different objectives and are not compared. A single outlier may come of
a hard batch; ``spike_steps`` of them in a row are a spike.

Source: Chowdhery et al., "PaLM" (arXiv 2204.02311), section 5.1: go back to a checkpoint from about 100
steps before the spike and skip 200 to 500 batches; the same data from another state did no harm.
Differs: the stage goes back to the newest checkpoint from before the spike, and skips the data since then.
"""

import statistics
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from engine.step.report import StepResult
from moe.ranges import Range

_SIGMAS_PER_MAD = 1.4826
_LEAST_SPREAD = 0.01
"""Smallest spread, as a share of the median: otherwise the band would have almost no width if losses hardly change."""


@dataclass(frozen=True)
class GuardConfig:
    """Reaction to losses that are not finite or spike, and to processes that hang.

    A step whose loss or gradient is not finite is skipped and counted. After a rollback the stage resumes from the
    newest whole checkpoint that was taken before the first bad step.

    Attributes:
        max_skipped_steps: Skipped steps in a row after which the stage rolls back, or stops with an error.
        spike_factor: How many standard deviations (estimated by the median distance from the median) a loss may lie
            above the median of recent steps on the same kinds of data; 0 allows any loss.
        spike_window: Number of these recent steps; losses are judged from half of them on.
        spike_steps: Steps in a row above the band after which the stage rolls back, or stops with an error.
        rollbacks: How often a stage may roll back before it stops with an error.
        skip_data: Skip the data between that checkpoint and the last bad step. false repeats the data, which helps
            against hardware errors only.
        hang_seconds: Seconds without progress after which the processes that hang are named, stack traces of all are
            written, and the run ends, 1 or more; 0 waits for ``launch.timeout_seconds``, which should be longer.
    """

    max_skipped_steps: Annotated[int, Range(0)] = 10
    spike_factor: Annotated[float, Range(0)] = 0.0
    spike_window: Annotated[int, Range(1)] = 100
    spike_steps: Annotated[int, Range(1)] = 3
    rollbacks: Annotated[int, Range(0)] = 0
    skip_data: bool = True
    hang_seconds: Annotated[float, Range(0)] = 600.0


@dataclass(frozen=True)
class Trouble:
    """The reason for which a run must not continue from its present weights.

    Attributes:
        first_bad: The first of the bad steps, counted from 1.
        what: What is wrong, as the beginning of a sentence.
        skipped: Whether the steps were skipped, so that the weights are still good.
    """

    first_bad: int
    what: str
    skipped: bool


class Guard:
    """Judges every step of a stage. Its inputs are equal on every process, so all processes get the same result.

    Attributes:
        skipped: Steps that were not finite.
        skipped_in_a_row: How many of them were the last ones.
    """

    def __init__(
        self, config: GuardConfig, skipped: int = 0, skipped_in_a_row: int = 0, state: Mapping[str, Any] | None = None
    ) -> None:
        """Starts with the stage, or resumes from a checkpoint.

        Args:
            config: The plan's section.
            skipped: See the class.
            skipped_in_a_row: Likewise.
            state: What ``state`` returned.
        """
        self._config = config
        self.skipped, self.skipped_in_a_row = skipped, skipped_in_a_row
        state = state or {}
        self._bad: int = state.get("bad_in_a_row", 0)
        self._outliers: int = state.get("outliers_in_a_row", 0)
        self._recent = {kinds: self._window(losses) for kinds, losses in state.get("losses", {}).items()}

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was a bad one."""
        return self._bad > 0

    def state(self) -> dict[str, Any]:
        """Plain containers; floats survive JSON exactly."""
        losses = {kinds: list(recent) for kinds, recent in self._recent.items()}
        return {"bad_in_a_row": self._bad, "outliers_in_a_row": self._outliers, "losses": losses}

    def judge(self, step: int, kinds: Collection[str], result: StepResult) -> Trouble | None:
        """Judges one step.

        Args:
            step: Optimizer steps taken, this one included.
            kinds: Of the step's micro-batches.
            result: What it reported.

        Returns:
            The reason for a rollback, if there is one.
        """
        if result.skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self._bad += 1
            if self.skipped_in_a_row < self._config.max_skipped_steps:
                return None
            what = f"{culprits(result)} not finite in {self.skipped_in_a_row} steps in a row"
            return Trouble(step - self._bad + 1, f"{what}, which is guard.max_skipped_steps", skipped=True)
        self.skipped_in_a_row = 0
        band = self._band(kinds)
        if band is None or result.loss <= band:
            self._bad = self._outliers = 0
            if self._config.spike_factor > 0:
                self._recent.setdefault(_key(kinds), self._window(())).append(result.loss)
            return None
        self._bad += 1
        self._outliers += 1
        if self._outliers < self._config.spike_steps:
            return None
        what = f"loss {result.loss:.4g} is above its band (up to {band:.4g}, guard.spike_factor)"
        return Trouble(step - self._bad + 1, f"{what} in {self._outliers} steps, which is guard.spike_steps", False)

    def _band(self, kinds: Collection[str]) -> float | None:
        """The highest loss that is no outlier; None while there are too few steps."""
        recent = self._recent.get(_key(kinds), ())
        if 2 * len(recent) < self._config.spike_window:
            return None
        median = statistics.median(recent)
        spread = _SIGMAS_PER_MAD * statistics.median(abs(loss - median) for loss in recent)
        return median + self._config.spike_factor * max(spread, _LEAST_SPREAD * abs(median))

    def _window(self, losses: Collection[float]) -> "deque[float]":
        return deque(losses, maxlen=self._config.spike_window)


def culprits(result: StepResult) -> str:
    """What was not finite in a skipped step."""
    return ", ".join(name for name, loss in result.losses.items() if loss - loss != 0.0) or "the gradient"


def _key(kinds: Collection[str]) -> str:
    return "+".join(sorted(set(kinds)))
