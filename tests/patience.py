"""Limits of tests in seconds of a machine that has nothing else to do; on a busy or slow one they grow.

A fixed piece of work tells by how much: the time that it takes here and now, over the time that it takes on the machine
that the limits were set on. Every limit is looked at anew when it is reached, so that load that comes later counts too.
No limit grows beyond ``MOST`` times: what hangs ends.

``pytest.mark.timeout`` and ``timeout`` of ``pyproject.toml`` grow in the same way (``conftest.py``).
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytest_timeout

MOST = 12.0
"""Largest factor by which a limit grows."""

REFERENCE_SECONDS = 0.009
"""Seconds that ``_work`` takes on the machine that the limits were set on, with nothing else running."""

_LOOKS = 3
_MEMORY_SECONDS = 5.0
"""A factor that was found less than this ago is not looked for again."""

_found: list[tuple[float, float]] = []


def factor() -> float:
    """By how much limits are longer now than they are written, from 1 to ``MOST``."""
    now = time.monotonic()
    if not _found or now - _found[-1][0] > _MEMORY_SECONDS:
        _found[:] = [(now, _look())]
    return _found[-1][1]


def seconds(limit: float) -> float:
    """A limit for what takes no ``Limit``: as long as it has to be at this moment."""
    return limit * factor()


class Limit:
    """A limit that grows while it runs.

    Attributes:
        written: Seconds as a test has them.
    """

    def __init__(self, written: float) -> None:
        """Begins to run."""
        self.written = written
        self._began = time.monotonic()
        self._worst = factor()

    def left(self) -> float:
        """Seconds that are left, looked at anew where there seem to be none; 0 if there are none."""
        if (left := self._left()) <= 0:
            self._worst = max(self._worst, factor())
            left = self._left()
        return max(left, 0.0)

    def passed(self) -> bool:
        """Whether nothing is left."""
        return self.left() == 0

    def _left(self) -> float:
        return self._began + self.written * self._worst - time.monotonic()


def communicate(process: "subprocess.Popen[Any]", limit: float) -> tuple[Any, Any]:
    """``process.communicate`` within a limit.

    Raises:
        subprocess.TimeoutExpired: It still runs.
    """
    return _within(limit, lambda left: process.communicate(timeout=left))


def wait(process: "subprocess.Popen[Any]", limit: float) -> int:
    """``process.wait`` within a limit.

    Raises:
        subprocess.TimeoutExpired: It still runs.
    """
    return _within(limit, lambda left: process.wait(timeout=left))


def run(command: Sequence[Any] | str, *, limit: float, **options: Any) -> "subprocess.CompletedProcess[Any]":
    """``subprocess.run`` within a limit; a process that is still running then is killed.

    Raises:
        subprocess.TimeoutExpired: It had to be killed.
        subprocess.CalledProcessError: With ``check``: it failed.
    """
    check = options.pop("check", False)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options) as process:
        try:
            output, errors = communicate(process, limit)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def wait_for(condition: Callable[[], bool], limit: float, what: str, pause: float = 0.02) -> None:
    """Waits until a condition holds.

    Raises:
        AssertionError: It does not within the limit.
    """
    running = Limit(limit)
    while not condition():
        assert not running.passed(), f"{what}: not within {limit} s, on a machine {factor():.1f} times as slow"
        time.sleep(pause)


def set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """The alarm of pytest-timeout with a limit that grows; None where it uses no alarm, and does it itself."""
    if settings.method != "signal" or not settings.timeout:
        return None
    limit = Limit(settings.timeout)

    def ring(number: int, frame: object) -> None:
        __tracebackhide__ = True
        if (left := limit.left()) > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
        else:
            pytest_timeout.timeout_sigalrm(item, settings)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel  # type: ignore[attr-defined]
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit.left())
    return True


def _within(limit: float, wait_on: Callable[[float], Any]) -> Any:
    running = Limit(limit)
    while True:
        try:
            return wait_on(running.left())
        except subprocess.TimeoutExpired:
            if running.passed():
                raise


def _look() -> float:
    """The slowness of this machine: how long the work takes, and how many processes there are for each core."""
    spent = 0.0
    for _ in range(_LOOKS):
        began = time.perf_counter()
        _work()
        spent += time.perf_counter() - began
    slower = spent / _LOOKS / REFERENCE_SECONDS
    waiting = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(max(slower, waiting, 1.0), MOST)


def _work() -> int:
    total = 0
    for number in range(300_000):
        total += number & 7
    return total
