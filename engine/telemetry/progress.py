"""The console output of a run: a live panel on a terminal, plain lines elsewhere, nothing on other replicas."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.telemetry.console import PlainConsole, PlainTable, plain_text
from engine.telemetry.curve import CurvePoint, curve_text
from engine.telemetry.pace import Clock, SmoothedLosses, duration
from omnivl.shown import printable

NO_RATES: Mapping[str, float] = MappingProxyType({})


class Progress(Protocol):
    """The interface through which the loop reports progress."""

    def __enter__(self) -> Self:
        """Starts showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops showing and leaves the terminal as it was."""

    def begin_stage(self, index: int, name: str, steps: int, done: int) -> None:
        """A stage starts or goes on.

        Args:
            index: From 0.
            name: The stage's name.
            steps: Steps that it has.
            done: Steps taken before.
        """

    def update(
        self,
        step: int,
        losses: Mapping[str, float],
        samples_per_second: float,
        learning_rates: Mapping[str, float] = NO_RATES,
    ) -> None:
        """One optimizer step is done.

        Args:
            step: Steps taken.
            losses: Raw losses by objective, of those that were active.
            samples_per_second: Over all replicas.
            learning_rates: Of the step, by group of parameters.
        """

    def curve(self, points: Sequence[CurvePoint], share: float | None) -> None:
        """The stage's curve has a new point, or is taken over from an earlier start.

        Args:
            points: At least one, the newest last.
            share: Of the time of training that the curve has taken; None before the first step.
        """

    def message(self, text: str) -> None:
        """Prints a message on a separate line."""

    def show(self, renderable: object) -> None:
        """A table or another thing that Rich can print."""


class _NothingToClose:
    """A display without resources to open or close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class _Console:
    """Base of both visible displays."""

    def __init__(self, console: Console, stages: Mapping[str, int], every: int) -> None:
        self.console = console
        self.every = every
        self.stages = list(stages)
        self.steps = list(stages.values())
        self.clock = Clock(dict(enumerate(self.steps)))
        self.losses = SmoothedLosses()
        self.stage = 0
        self.step = 0
        self.speed = 0.0
        self.rates: list[float] = []
        self.begun = False
        self.learned = ""

    def begin_stage(self, index: int, name: str, steps: int, done: int) -> None:
        assert (self.stages[index], self.steps[index]) == (name, steps)
        self.stage, self.step, self.begun = index, done, True
        self.speed, self.rates, self.learned = 0.0, [], ""
        self.losses = SmoothedLosses()
        self.clock.begin(index, done)

    def update(
        self,
        step: int,
        losses: Mapping[str, float],
        samples_per_second: float,
        learning_rates: Mapping[str, float] = NO_RATES,
    ) -> None:
        """Takes the figures in."""
        self.step, self.speed, self.rates = step, samples_per_second, sorted(set(learning_rates.values()))
        self.losses.add(losses)

    def curve(self, points: Sequence[CurvePoint], share: float | None) -> None:
        """Takes the newest point in."""
        bars = self.console.encoding.startswith("utf")
        self.learned = printable(curve_text(points, share, bars=bars))

    def show(self, renderable: object) -> None:
        """Prints a table or the like; above the panel, where there is one."""
        self.console.print(renderable)

    def heading(self) -> str:
        return printable(f"stage {self.stage + 1}/{len(self.stages)} {self.stages[self.stage]}")

    def losses_text(self) -> str:
        return printable("  ".join(f"{name} {loss:.3f}" for name, loss in sorted(self.losses.means.items())))

    def rates_text(self) -> str:
        """``lr 1.00e-04``; the lowest and the highest where groups of parameters differ."""
        shown = [f"{rate:.2e}" for rate in self.rates]
        return "" if not shown else f"lr {shown[0]}" if len(shown) == 1 else f"lr {shown[0]} to {shown[-1]}"

    def time_text(self) -> str:
        here, run = self.clock.left(self.step)
        return f"{duration(here)} left in stage, {duration(run)} in run"


class PlainProgress(_NothingToClose, _Console):
    """One line every n steps: for log files and batch jobs."""

    def begin_stage(self, index: int, name: str, steps: int, done: int) -> None:
        """Prints the stage's name and length."""
        super().begin_stage(index, name, steps, done)
        self.message(f"{self.heading()}: {steps} steps" + (f", going on after step {done}" if done else ""))

    def update(
        self,
        step: int,
        losses: Mapping[str, float],
        samples_per_second: float,
        learning_rates: Mapping[str, float] = NO_RATES,
    ) -> None:
        """Takes the figures in and prints every n steps."""
        super().update(step, losses, samples_per_second, learning_rates)
        if step % self.every == 0 or step == self.steps[self.stage]:
            self.message(
                f"{self.heading()}  step {step}/{self.steps[self.stage]}  {self.losses_text()}  "
                + "".join(f"{text}  " for text in (self.rates_text(),) if text)
                + f"{self.speed:.1f} samples/s  {self.time_text()}"
            )

    def curve(self, points: Sequence[CurvePoint], share: float | None) -> None:
        """Prints the newest point."""
        super().curve(points, share)
        self.message(f"{self.heading()}  step {points[-1].step}/{self.steps[self.stage]}  {self.learned}")

    def message(self, text: str) -> None:
        """Prints a line."""
        self.console.print(plain_text(text, keep="\n"), soft_wrap=True)


class LiveProgress(_Console):
    """A panel that redraws itself at the bottom of the terminal, and stays there as it was when a stage ends."""

    def __init__(self, console: Console, stages: Mapping[str, int], every: int) -> None:
        """See ``make_progress``."""
        super().__init__(console, stages, every)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin_stage(self, index: int, name: str, steps: int, done: int) -> None:
        """Leaves the panel of the stage before above that of this one."""
        if self.begun:
            self.console.print(self._render())
        super().begin_stage(index, name, steps, done)

    def message(self, text: str) -> None:
        """Prints a line above the panel."""
        self.console.print(plain_text(text, keep="\n"))

    def _render(self) -> Table:
        total = self.steps[self.stage]
        grid = PlainTable.grid(padding=(0, 2))
        if not self.begun:
            return grid
        bar = ProgressBar(total=total, completed=self.step, width=40)
        grid.add_row(Text(self.heading(), style="bold"), bar, f"step {self.step}/{total}")
        grid.add_row(Text("losses", style="dim"), self.losses_text() or "-", f"{self.speed:.1f} samples/s")
        grid.add_row(Text("time", style="dim"), self.time_text(), self.rates_text())
        if self.learned:
            grid.add_row(Text("curve", style="dim"), self.learned)
        return grid


class SilentProgress(_NothingToClose):
    """For all replicas but the first."""

    def begin_stage(self, index: int, name: str, steps: int, done: int) -> None:
        """Shows nothing."""

    def update(
        self,
        step: int,
        losses: Mapping[str, float],
        samples_per_second: float,
        learning_rates: Mapping[str, float] = NO_RATES,
    ) -> None:
        """Shows nothing."""

    def curve(self, points: Sequence[CurvePoint], share: float | None) -> None:
        """Shows nothing."""

    def message(self, text: str) -> None:
        """Shows nothing."""

    def show(self, renderable: object) -> None:
        """Shows nothing."""


def make_progress(stages: Mapping[str, int], *, every: int, visible: bool, console: Console | None = None) -> Progress:
    """Chooses the display.

    Args:
        stages: Steps of each stage by name, in order.
        every: Steps between two plain lines.
        visible: False on all replicas but the first.
        console: Where to print; standard output by default.
    """
    if not visible:
        return SilentProgress()
    console = PlainConsole() if console is None else console
    return (LiveProgress if console.is_terminal else PlainProgress)(console, stages, every)
