"""The environment of a run: versions, hardware, commit. Written into its folder, so that results can be traced."""

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("omnivl-engine", "torch", "deepspeed", "transformers", "numpy", "webdataset", "av", "pillow", "megablocks")


def describe_environment(world_size: int) -> dict[str, Any]:
    """Returns versions, hardware and commit as plain JSON.

    Args:
        world_size: Number of processes of the run on all machines.
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hostname": socket.gethostname(),
        "command": sys.argv,
        "processes": world_size,
        "threads_per_process": torch.get_num_threads(),
        "cpu": f"{usable_cores()} cores of {cpu_model()}",
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpu": ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **package_versions(),
        "git": git_commit(Path(__file__).parent),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Memory that this process holds now, in bytes; 0 if the system does not report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def cpu_model() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that ``folder`` lies in and whether it has changes; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None  # an installed package has no repository, and a machine may have no git
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
