"""Joining and leaving the process group of a run, as the launcher's environment describes it."""

import datetime
import os
import sys
from multiprocessing import util
from typing import NoReturn

import torch
import torch.distributed as dist

from engine.processes.belonging import SECRET
from engine.processes.rendezvous import meet, read_meeting, use_loopback
from engine.processes.variables import number_in
from omnivl.errors import UserError


def launched_processes() -> int:
    """Number of processes of the run, from ``WORLD_SIZE``; 1 where no launcher set it."""
    return number_in(os.environ, "WORLD_SIZE", least=1, absent=1)


def local_processes() -> int:
    """Processes of the run on this machine, from ``LOCAL_WORLD_SIZE``; all of them where no launcher set it."""
    return number_in(os.environ, "LOCAL_WORLD_SIZE", least=1, absent=launched_processes())


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name; by default the GPU of this process, by ``LOCAL_RANK``, or the CPU where there is none.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: This machine has no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is not None:
        allowed = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
        if name not in allowed:
            raise UserError(
                f"device: got {name!r}; allowed on this machine are {', '.join(map(repr, allowed))}; name one of them"
            )
        return torch.device(name)
    return torch.device("cuda", number_in(os.environ, "LOCAL_RANK", absent=0) % gpus) if gpus else torch.device("cpu")


def join_process_group(timeout_seconds: float = 1800.0, *, always: bool = False) -> torch.device:
    """Joins the default process group (nccl on GPUs, gloo on CPUs) and selects this process' device.

    Args:
        timeout_seconds: How long a collective waits for the other processes before the run fails.
        always: Make a process group for a single process too, as DeepSpeed needs one.

    Returns:
        The device of this process.

    Raises:
        LaunchError: The launcher's variables are wrong.
        RendezvousError: The processes did not come together within that time, or a stranger was among them.
    """
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized() or (launched_processes() == 1 and not always):
        return device
    # A single process needs no port, as no other one joins.
    alone = launched_processes() == 1 and "MASTER_ADDR" not in os.environ
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout_seconds)
    if alone:
        use_loopback()
        nobody = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=nobody, rank=0, world_size=1)
    else:
        meeting = read_meeting(os.environ)
        os.environ.pop(SECRET, None)  # of no concern to processes that this one starts
        store = meet(meeting, timeout_seconds)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=meeting.rank, world_size=meeting.processes)
    return device


def finish(code: int = 0) -> NoReturn:
    """Ends a worker process: waits for the others, flushes, exits without the interpreter's shutdown.

    ``os._exit`` skips the interpreter's shutdown, in which a thread of gloo may request the interpreter lock and abort
    the process after correct results. A process that fails does not wait, since the others may never arrive.
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
    _remove_own_folder()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _remove_own_folder() -> None:
    """Removes the temporary folder ``pymp-*`` with the sockets to data workers, as the interpreter's shutdown does.

    Not that of a process from which this one was forked.
    """
    for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is util._remove_temp_dir and finalizer._pid == os.getpid():  # type: ignore[attr-defined]
            finalizer()
