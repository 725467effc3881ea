"""Comparative timing: contenders take turns, and ratios of their times within one round are compared.

Other load on the machine then affects all contenders equally. A ratio is given as the median over the rounds, with its
range: a wide range means that there was other load.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over the rounds.

    Attributes:
        median: Median.
        least: Smallest value.
        most: Largest value.
        rounds: Number of values.
    """

    median: float
    least: float
    most: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of at least one value."""
        assert values, "nothing was measured"
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.least)} to {short(self.most)})"


@dataclass(frozen=True)
class Ratio:
    """A main result of a benchmark, with its target.

    Attributes:
        name: Name of the quotient.
        value: Over the rounds.
        at_least: Target from below; None for none.
        at_most: Target from above; None for none.
    """

    name: str
    value: Spread
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median meets its targets; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = self.at_least is None or self.value.median >= self.at_least
        return low and (self.at_most is None or self.value.median <= self.at_most)

    @property
    def target(self) -> str:
        """The target in words."""
        bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(bounds) or "none"


def take_turns(
    contenders: Mapping[Name, Step], rounds: int, device: torch.device, warmup: int = 1
) -> dict[Name, list[float]]:
    """Times each contender once per round.

    Args:
        contenders: Steps by name.
        rounds: Number of timed rounds.
        device: Where they compute; a GPU is waited for at both ends of each step.
        warmup: Rounds that are not counted.

    Returns:
        Seconds by name, one per round.
    """
    return alternate({name: partial(timed, step, device) for name, step in contenders.items()}, rounds, warmup)


def alternate(clocked: Mapping[Name, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[Name, list[float]]:
    """Calls each contender once per round, in an order that is reversed from round to round.

    Args:
        clocked: Contenders that time themselves and return the seconds that count.
        rounds: Number of rounds that count.
        warmup: Rounds before them that do not.

    Returns:
        Seconds by name, one per round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in clocked}
    for number in range(warmup + rounds):
        names = list(clocked) if number % 2 == 0 else list(clocked)[::-1]
        for name in names:
            taken = clocked[name]()
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one step."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def over(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of quotients, round by round."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def rates(amount: float, seconds: Sequence[float]) -> Spread:
    """The spread of ``amount`` per second."""
    return Spread.of([amount / one for one in seconds])


def short(value: float) -> str:
    """A number with three significant digits, or with all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def quartiles(values: Sequence[float]) -> str:
    """Median and quartiles of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{short(middle)} ({short(low)} to {short(high)})"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear_peak() -> None:
    """Resets the kernel's peak memory of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak memory of this process since the reset, in bytes."""
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A figure of this process in bytes, from ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
