"""Supervises ranks whose launcher ends them too soon, ends before them, or does not report how they ended.

mpirun answers TERM and Ctrl-C by a TERM to its ranks and a KILL within half a second, and nothing tells it to wait
longer. deepspeed's launcher passes the exit code of a killed rank on, but not its number. So the process that they
start supervises a child, which trains. The child has a session of its own, so that it gets no signals to the process
group, and it is not ended when its supervisor is killed.

torchrun ends at USR1, and the command deepspeed at any signal, without ending their ranks: the ranks watch for this.
"""

import contextlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
from types import FrameType

import psutil

from engine.watch.failure import Failure, ended_by
from engine.watch.stop import STOP_SIGNALS

_LOOK_SECONDS = 1.0
_DEEPSPEED = "deepspeed.launcher.launch"


def supervise() -> None:
    """Returns in a child of this process; the process itself passes stop signals on and ends as the child does.

    A child that loses its supervisor stops as at TERM: training saves a checkpoint after its step. Its further output
    is lost, since its launcher no longer reads it.

    Called before CUDA is used: the child is a copy of this process.
    """
    lost, held = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child != 0:
        os.close(lost)
        _await(child)
    os.close(held)
    os.setsid()
    threading.Thread(target=_follow, args=(lost,), name="omnivl-supervisor", daemon=True).start()


def _await(child: int) -> None:
    """Ends this process as the child ends: with its exit code, or by the same signal."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        rank = int(os.environ["RANK"])
        Failure(128 - code, f"{ended_by(rank, -code)} on {socket.gethostname()}", rank).tell()
        with contextlib.suppress(OSError):  # KILL and STOP have no handlers
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _follow(lost: int) -> None:
    """Waits for the end of the supervisor, which closes the other end of the pipe."""
    os.read(lost, 1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.kill(os.getpid(), signal.SIGTERM)


def follow_launcher() -> None:
    """Makes this process stop as at TERM when its launcher has ended: training saves a checkpoint."""
    threading.Thread(target=_watch, args=(_launcher(),), name="omnivl-launcher", daemon=True).start()


def _watch(launcher: tuple[int, ...]) -> None:
    while _launcher() == launcher:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _launcher() -> tuple[int, ...]:
    """The process that has started this one; two of deepspeed's, whose command starts the one that starts ranks."""
    parent = os.getppid()
    try:
        process = psutil.Process(parent)
        return (parent, process.ppid()) if _DEEPSPEED in " ".join(process.cmdline()) else (parent,)
    except psutil.Error:  # it has just ended
        return ()


def main() -> None:
    """Runs a module under supervision: ``python -m launcher.start.supervisor MODULE ARGUMENTS ...``."""
    supervise()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
