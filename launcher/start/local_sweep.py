"""The runs of a sweep on this machine: several at a time, each with its share of it."""

import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from engine.sweep.config import Point, Sweep
from engine.telemetry.console import say
from engine.watch.failure import Failure, clear_failure
from launcher.start.local import local_processes
from launcher.start.shares import Share, share_machine
from omnivl.errors import UserError

_SAID_LINES = 12
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def run_sweep_here(
    sweep: Sweep, points: Sequence[Point], folder: Path, parallel: int, *, dry_run: bool, offline: bool = False
) -> int:
    """Runs them. A stop signal is passed on, so that active runs save a checkpoint, and no further run is started.

    Args:
        sweep: The sweep.
        points: Those of its runs that are wanted.
        folder: Of its runs.
        parallel: Runs at the same time.
        dry_run: Print the commands instead.
        offline: Let runs begin without a look at their data and weights.

    Returns:
        0; 1 where a run failed; 128 + n where signal n ended the sweep.

    Raises:
        UserError: A run does not fit this machine; nothing is begun then.
    """
    over = [point.name for point in points if (point.nodes or 1) > 1]
    if over:
        raise UserError(
            f"{sweep.file}: axes: got more than one node for {', '.join(over)}; allowed is one on this machine; run "
            "the sweep with --on slurm"
        )
    if dry_run:
        for point in points:
            say(shlex.join(_command(point, folder / point.name, offline)))
        return 0
    shares = share_machine(max(1, min(parallel, len(points))))
    _check_shares(sweep, points, shares)
    say(f"{sweep.name}: {len(points)} of {len(sweep.points)} runs to do, in {folder}")
    return _Runs(folder, shares, offline).run(points)


def _check_shares(sweep: Sweep, points: Sequence[Point], shares: Sequence[Share]) -> None:
    least = min(len(share.gpus) for share in shares)
    for point in points:
        if least and (processes := local_processes(point.plan.launch.processes, least)) > least:
            raise UserError(
                f"{sweep.file}: run {point.name!r}: got {processes} processes; allowed is {least} with {len(shares)} "
                "runs at once on this machine's GPUs; lower --parallel"
            )


def _command(point: Point, folder: Path, offline: bool) -> list[str]:
    start = [sys.executable, "-m", "launcher.cli", "pretrain", str(point.base)]
    return [*start, *point.overrides, "--run-folder", str(folder), *(["--offline"] if offline else [])]


class _Runs:
    """Those under way."""

    def __init__(self, folder: Path, shares: Sequence[Share], offline: bool) -> None:
        self._offline = offline
        self._folder = folder
        self._count = len(shares)
        self._free: SimpleQueue[Share] = SimpleQueue()
        for share in shares:
            self._free.put(share)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._received: list[int] = []

    def run(self, points: Sequence[Point]) -> int:
        """All of them; returns the exit status."""
        previous = {number: signal.signal(number, self._stop) for number in _FORWARDED}
        try:
            with ThreadPoolExecutor(self._count) as pool:
                codes = list(pool.map(self._run, points))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._received:
            return 128 + self._received[0]
        failed = [point.name for point, code in zip(points, codes, strict=True) if code]
        if failed:
            say(f"{len(failed)} failed: {', '.join(failed)}; failure.json in their folders says why", err=True)
        return 1 if failed else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        for process in list(self._running):
            process.terminate()

    def _run(self, point: Point) -> int | None:
        """Runs one plan to its end; the last lines of a failed run are kept.

        Returns:
            Its exit code; None where the sweep was stopped.
        """
        share = self._free.get()
        folder = self._folder / point.name
        environment = share.environment(local_processes(point.plan.launch.processes, len(share.gpus)))
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            try:
                if self._received:
                    return None
                folder.mkdir(parents=True, exist_ok=True)
                clear_failure(folder)
                process = subprocess.Popen(
                    _command(point, folder, self._offline),
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                self._running.add(process)
                if self._received:  # a signal that came after the check above
                    process.terminate()
                code = process.wait()
                self._running.discard(process)
            finally:
                self._free.put(share)
            if self._received:
                say(f"{point.name}: stopped")
                return None
            if code != 0:
                said.seek(0)
                Failure(code, "".join(said.readlines()[-_SAID_LINES:]).strip()).write(folder)
        say(f"{point.name}: {'done' if code == 0 else f'failed with exit code {code}'}")
        return code
