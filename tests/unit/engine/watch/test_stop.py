"""Stop signals: what a process says at the end of a step, and which signal all of them follow."""

import os
import signal

from engine.watch.stop import StopRequest


def test_a_signal_is_voted_for_until_the_end() -> None:
    stop, before = StopRequest(), signal.getsignal(signal.SIGUSR1)
    assert not any(stop.votes().values())
    signal.signal(signal.SIGUSR1, stop._note)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        said = [name for name, yes in stop.votes().items() if yes]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(said) == 1
    assert stop.agreed(said) == signal.SIGUSR1


def test_processes_that_got_different_signals_follow_the_same() -> None:
    names = StopRequest().votes().keys()
    assert StopRequest.agreed(names) == signal.SIGTERM
    assert StopRequest.agreed(["the curve is due"]) == 0
