"""The steps of a job: srun's command lines, and a step from its start to its end."""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.disk.run_folder import write_whole
from engine.processes.belonging import SECRET, new_secret
from engine.telemetry.console import say
from engine.watch.failure import FAILURE_FILE
from launcher.slurm.allocation import Allocation
from launcher.slurm.spec import JobRun, JobSpec

RANK_LOGS: Mapping[str, str] = {"srun": "rank-{}.log", "deepspeed": "*_rank{}.log"}
"""By launcher: pattern of a rank's log in the folder of a start."""


def srun(nodes: int, tasks_per_node: int, *options: str) -> list[str]:
    """A step over the whole allocation: no terminal, every variable passed on, one lost task ends the step."""
    return [
        *("srun", "--export=ALL", "--input=none", "--kill-on-bad-exit=1"),
        *(f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"),
        *options,
    ]


def worker_arguments(spec: JobSpec, task: JobRun, restart: int) -> list[str]:
    """The arguments of every rank. Only the first start of a job may delete an earlier run."""
    flags = ["--fresh"] if spec.fresh and restart == 0 else []
    flags += ["--amend"] if spec.amend else []
    flags += [] if spec.stage is None else ["--stage", spec.stage]
    return ["--run-folder", task.folder, *flags, "--", task.plan]


def training_step(spec: JobSpec, allocation: Allocation, logs: Path) -> list[str]:
    """The step that trains: a task for each rank, or for each node where deepspeed's launcher starts the ranks.

    Args:
        spec: The job.
        allocation: Where it runs.
        logs: Folder that gets a log of each rank.
    """
    arguments = worker_arguments(spec, spec.tasks[allocation.task], allocation.restart)
    if spec.profile.launcher == "srun":
        start = srun(spec.nodes, spec.processes_per_node, f"--output={logs}/rank-%t.log")
        return [*start, sys.executable, "-m", "launcher.start.worker", *arguments]
    hosts = logs / "hostfile"
    write_whole(hosts, "".join(f"{node} slots={spec.processes_per_node}\n" for node in allocation.nodes))
    return [
        *srun(spec.nodes, 1, f"--output={logs}/node-%n.log"),
        *(sys.executable, "-m", "launcher.slurm.deepspeed_node", str(hosts), str(logs), *arguments),
    ]


def training_environment(spec: JobSpec, allocation: Allocation, failure_file: Path) -> dict[str, str]:
    """Variables of the step that trains, on top of the job's."""
    found = {
        "MASTER_ADDR": allocation.nodes[0],
        "MASTER_PORT": str(allocation.port),
        "PYTHONUNBUFFERED": "1",
        FAILURE_FILE: str(failure_file),
        SECRET: new_secret(),
    }
    if spec.profile.interface is not None:
        found |= {"NCCL_SOCKET_IFNAME": spec.profile.interface, "GLOO_SOCKET_IFNAME": spec.profile.interface}
    return found


class Step:
    """A running step. srun's own messages are kept, line by line, with the time of each."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts it; its tasks write into files."""
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.messages: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, name="omnivl-srun", daemon=True)
        self._reader.start()

    def signal(self, number: int) -> None:
        """Has srun pass a signal on to every task."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns srun's exit code; a step that takes longer than ``timeout`` is ended."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            try:
                code = self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
        self._reader.join(5)
        return code

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.messages.append((time.monotonic(), line.rstrip("\n")))
            say(line.removesuffix("\n"), err=True)
