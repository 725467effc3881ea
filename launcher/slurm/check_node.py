"""Checks one node before training: ``python -m launcher.slurm.check_node SPEC REPORTS RUN``, once on every node.

Each node writes its results into a separate file, first those about itself, then that of a sum over all nodes. A node
that writes nothing counts as bad. The job reads the files (``launcher.slurm.verdicts``).
"""

import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from engine.processes.process_group import finish, join_process_group, launched_processes
from engine.processes.variables import LaunchError
from launcher.slurm.profile import NodeCheckConfig
from launcher.slurm.spec import JobSpec, read_spec
from launcher.slurm.verdicts import NodeReport, write_report
from launcher.start.discovery import join_launch

_ELEMENTS = 1 << 20


def main() -> None:
    """Checks this node; exit code 1 where something is wrong with it."""
    spec, reports = read_spec(Path(sys.argv[1])), Path(sys.argv[2])
    check, name = spec.profile.check, os.environ["SLURMD_NODENAME"]
    problems = local_problems(spec, Path(sys.argv[3]))
    write_report(reports, NodeReport(name, tuple(problems), time.time()))
    if problems:
        finish(1)
    try:
        write_report(reports, NodeReport(name, (), time.time(), together=_sum_over_nodes(check)))
    except (RuntimeError, LaunchError) as error:
        write_report(reports, NodeReport(name, (), time.time(), error=str(error).splitlines()[0]))
        finish(1)
    finish(0)


def local_problems(spec: JobSpec, folder: Path) -> list[str]:
    """Problems of this node that do not involve others.

    Args:
        spec: The job's requirements.
        folder: The run's folder.
    """
    check = spec.profile.check
    problems = []
    if (found := torch.cuda.device_count()) < spec.gpus_per_node:
        problems.append(f"{found} of {spec.gpus_per_node} GPUs are visible")
    if torch.cuda.is_available():
        problems += [problem for index in range(found) if (problem := _gpu_problem(index)) is not None]
    for place, gib, name in (
        (folder, check.free_gib, "free_gib"),
        (Path("/dev/shm"), check.free_memory_gib, "free_memory_gib"),
    ):
        if (problem := _disk_problem(place, gib, name)) is not None:
            problems.append(problem)
    return problems


def _gpu_problem(index: int) -> str | None:
    """Checks a product on a GPU: a listed GPU may not be usable any more."""
    try:
        ones = torch.ones(256, 256, device=torch.device("cuda", index))
        right = bool(((ones @ ones) == 256).all())
    except RuntimeError as error:
        return f"GPU {index}: {str(error).splitlines()[0]}"
    return None if right else f"GPU {index} computes a wrong product"


def _disk_problem(place: Path, gib: float, name: str) -> str | None:
    """Writes a file, reads it, and asks for the free space."""
    probe = place / f".omnivl-check-{os.environ['SLURMD_NODENAME']}-{os.getpid()}"
    content = os.urandom(4096)
    try:
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        same = probe.read_bytes() == content
        free = shutil.disk_usage(place).free / 2**30
        probe.unlink()
    except OSError as error:
        return f"{place} cannot be written ({error.strerror})"
    if not same:
        return f"{place} gives back other bytes than were written"
    return None if free >= gib else f"{place} has {free:.2f} GiB free, less than check.{name} ({gib:g})"


def _sum_over_nodes(check: NodeCheckConfig) -> float:
    """Sums over all nodes in the same way as training; returns the time at which all were done.

    Raises:
        LaunchError: A node did not come.
        RuntimeError: A node did not take part, or the sum is wrong.
    """
    join_launch(by_hand=False)
    device = join_process_group(check.timeout_seconds / 2)
    if launched_processes() == 1:
        return time.time()
    ones = torch.ones(_ELEMENTS, device=device)
    for _ in range(3):  # the first one sets connections up
        ones.fill_(1.0)
        dist.all_reduce(ones)
    if not bool((ones == dist.get_world_size()).all()):
        raise RuntimeError("the sum over all nodes is wrong")
    dist.barrier()
    return time.time()


if __name__ == "__main__":
    main()
