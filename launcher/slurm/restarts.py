"""When a job is restarted: depends on what ended it, and on its progress since the last starts."""

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.watch.failure import HUNG
from omnivl.data.plain_files import not_through_links

_STOPPED = {
    128 + signal.SIGUSR1: "asked to save (USR1)",
    128 + signal.SIGTERM: "asked to end (TERM), though nobody has cancelled the job",
}

Verdict = Literal["done", "again", "failed"]


@dataclass(frozen=True)
class Start:
    """One start of a job.

    Attributes:
        job: Its number.
        restart: How often it was started before.
        steps: Optimizer steps of all stages that the run had saved by then.
        time: Seconds since 1970.
    """

    job: int
    restart: int
    steps: int
    time: float


class Restarts:
    """The starts of the jobs of one run, in a file of its folder."""

    def __init__(self, file: Path, job: int, limit: int) -> None:
        """Takes the file, the job, and how often it may start again without a further step."""
        self._file, self._job, self._limit = file, job, limit

    def note(self, restart: int, steps: int) -> None:
        """Records that the job starts."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", opener=not_through_links) as file:
            file.write(json.dumps(Start(self._job, restart, steps, time.time()).__dict__) + "\n")

    def refusal(self, steps: int) -> str | None:
        """Why the job, which has saved this many steps, must not be started again; None if it may."""
        starts = [Start(**json.loads(line)) for line in _lines(self._file)]
        own = [start.steps for start in starts if start.job == self._job]
        idle = 0
        while idle < len(own) and own[-1 - idle] >= steps:
            idle += 1
        if idle <= self._limit:
            return None
        times = "once" if idle == 1 else f"{idle} times"
        return (
            f"job {self._job} was started {times} at step {steps} and saved no step more; it is not started again "
            "(restarts_without_progress in the cluster's file). Save more often (checkpoint.every), ask for more time, "
            "or see the logs of its starts"
        )


def judge(code: int, bad_nodes: int) -> tuple[Verdict, str]:
    """What to do after the ranks have ended, and why.

    Args:
        code: Exit code of the rank that failed first, or 0.
        bad_nodes: Nodes that no longer pass their check.
    """
    if code == 0:
        return "done", "the run is complete"
    if code in _STOPPED:
        return "again", f"the run was {_STOPPED[code]}, and goes on from its checkpoint"
    if bad_nodes:
        return "again", "a node has failed"
    if code == HUNG:
        return "again", "the run hung"
    if code > 128:
        return "again", f"a rank was ended by {_signal_name(code - 128)}"
    return "failed", f"the run failed with exit code {code}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []
