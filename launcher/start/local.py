"""Starts the processes of a run on this machine and waits for their end.

Differs from ``torch.distributed.run`` and deepspeed's launcher where a training run needs it: a stop signal is passed
on to the ranks (deepspeed's command ends at TERM without ending them), which then have as much time as a checkpoint
takes (torch: 30 s). A failure is reported once, by the process that failed first, and ends all others at once, with its
exit code.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from engine.processes.belonging import LOOPBACK, SECRET, new_secret
from engine.telemetry.environment import usable_cores
from engine.watch.failure import FAILURE_FILE, ended_by
from engine.watch.stop import LAUNCHED, STOP_SIGNALS
from launcher.start.discovery import free_port

_POLL_SECONDS = 0.05


def run_local(module: str, arguments: Sequence[str], processes: int) -> int:
    """Runs ``python -m module arguments`` in so many processes that form one process group.

    A stop signal is passed on once as SIGTERM: the workers save a checkpoint and end by themselves.

    Args:
        module: Calls ``launcher.start.worker.main``.
        arguments: The same for every process.
        processes: How many.

    Returns:
        0, or the exit code of the process that failed first; 128 + n where signal n ended the run.
    """
    with tempfile.TemporaryDirectory(prefix="omnivl-") as folder:
        environment = _environment(processes, Path(folder) / "failure")
        command = [sys.executable, "-m", module, *arguments]
        workers: list[subprocess.Popen[bytes]] = []
        received: list[int] = []

        def forward(number: int, frame: FrameType | None) -> None:
            if not received:
                print("stopping after this step; a checkpoint is saved", file=sys.stderr, flush=True)
                for worker in workers:
                    worker.terminate()
            received.append(number)

        previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
        try:
            for rank in range(processes):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                workers.append(subprocess.Popen(command, env=own, stdin=subprocess.PIPE))
            code = _wait(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 128 + received[0] if received and code > 128 else code


def local_processes(wanted: int | str, gpus: int) -> int:
    """Number of processes on this machine: ``auto`` takes one per GPU, or two where there is none."""
    return int(wanted) if wanted != "auto" else gpus or 2


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all are done or one has failed; returns the exit code of the run."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [(rank, code) for rank, code in enumerate(codes) if code is not None and code != 0]
        if failed:
            # When a signal ends a process, others fail because their connection to it is lost.
            rank, code = min(failed, key=lambda entry: entry[1] >= 0)
            if code < 0:
                print(ended_by(rank, -code), file=sys.stderr, flush=True)
                return 128 - code
            if code <= 128 or all(other is not None for other in codes):
                return code  # after a stopped worker the others get the time to stop too
        elif all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _environment(processes: int, failure_file: Path) -> Mapping[str, str]:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
        SECRET: new_secret(),
        LAUNCHED: "1",
        FAILURE_FILE: str(failure_file),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    return environment
