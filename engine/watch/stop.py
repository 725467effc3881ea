"""Stopping a run from outside: the signal is recorded, and after the step the loop saves a checkpoint and ends."""

import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHED = "OMNIVL_LAUNCHED"
"""Set by our own launcher, which holds the other end of each worker's standard input."""


class StopRequest:
    """Remembers the first stop signal of this process."""

    def __init__(self) -> None:
        self._signal = 0

    def install(self) -> None:
        """Catches the stop signals. Only in the main thread."""
        launched = os.environ.get(LAUNCHED) == "1"
        for number in STOP_SIGNALS:
            # Ctrl-C reaches every process of the terminal, data workers too; our launcher turns it into SIGTERM.
            ignored = launched and number == signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else self._note)
        if launched:
            threading.Thread(target=_follow_launcher, name="omnivl-launcher", daemon=True).start()

    def votes(self) -> dict[str, bool]:
        """Whether this process got each of the signals."""
        return {_vote(number): self._signal == number for number in STOP_SIGNALS}

    @staticmethod
    def agreed(votes: Collection[str]) -> int:
        """The signal that stops the run, 0 for none.

        Args:
            votes: Those of ``votes`` that any process gave, equal on every process.
        """
        return max((int(number) for number in STOP_SIGNALS if _vote(number) in votes), default=0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number


def _vote(number: int) -> str:
    return f"signal {int(number)}"


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that are started within the block do not get the stop signals, which may go to a whole process group.

    A cluster or a terminal signals data workers too; without them the loop could not finish its step. They inherit the
    blocked signals, and end when their parent does. A signal that arrives meanwhile is recorded at the end of the
    block.
    """
    resource_tracker.ensure_running()  # it unblocks signals when it starts, so it has to be started before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_launcher() -> None:
    """Waits for the end of standard input, which means that the launcher has ended; its workers have to end too."""
    while sys.stdin.buffer.read(4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
