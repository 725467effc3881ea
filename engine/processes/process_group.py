"""Joining and leaving the process group of a run, as the launcher's environment describes it."""

import datetime
import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist


def launched_processes() -> int:
    """Number of processes of the run, from ``WORLD_SIZE``; 1 where no launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Processes of the run on this machine, from ``LOCAL_WORLD_SIZE``; all of them where no launcher set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes()))


def choose_device() -> torch.device:
    """The GPU of this process, by ``LOCAL_RANK``, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def join_process_group(timeout_seconds: float = 1800.0, *, always: bool = False) -> torch.device:
    """Joins the default process group (nccl on GPUs, gloo on CPUs) and selects this process' device.

    Args:
        timeout_seconds: How long a collective waits for the other processes before the run fails.
        always: Make a process group for a single process too, as DeepSpeed needs one.

    Returns:
        The device of this process.
    """
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized() or (launched_processes() == 1 and not always):
        return device
    # A single process needs no port, as no other one joins.
    alone = launched_processes() == 1 and "MASTER_ADDR" not in os.environ
    store = dist.HashStore() if alone else None  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_seconds),
        store=store,
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
    )
    return device


def finish(code: int = 0) -> NoReturn:
    """Ends a worker process: waits for the others, flushes, exits without the interpreter's shutdown.

    ``os._exit`` skips the interpreter's shutdown, in which a thread of gloo may request the interpreter lock and abort
    the process after correct results. A process that fails does not wait, since the others may never arrive.
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
