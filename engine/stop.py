"""Stopping a run from outside: the signal is noted, the loop saves a checkpoint after the step and ends."""

import os
import signal
import sys
import threading
from types import FrameType

import torch

from engine import ranks

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

    def agreed(self, device: torch.device) -> int:
        """The signal number that stops the run, 0 for none; equal on every process. Called by every process."""
        return ranks.largest_over_ranks(self._signal, device)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number


def _follow_launcher() -> None:
    """Waits for the end of standard input: it comes when the launcher is gone, which must not leave workers behind."""
    while sys.stdin.buffer.read(4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
