"""Starts the worker processes of distributed tests."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import patience
import pytest
import torch
from worker import STACKS, RunDistributed, forked

# Workers are forked from a process that has imported what takes seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["engine.run.train", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"])


@pytest.fixture
def run_distributed(tmp_path: Path) -> RunDistributed:
    """``run_distributed(function, processes=2, limit=120, **arguments)`` -> what each rank returned.

    ``function`` stands at the top of a test file; it is called in fresh processes that have joined a gloo group.
    Arguments are JSON. A process that fails or hangs fails the test with its output.
    """
    started: list[int] = []

    def run(function: Callable[..., Any], *, processes: int, limit: float = 120, **arguments: Any) -> list[Any]:
        folder = tmp_path / f"run{len(started)}"
        started.append(processes)
        folder.mkdir()
        (folder / "arguments.json").write_text(json.dumps(arguments))
        command = [function.__code__.co_filename, function.__name__, str(folder / "arguments.json"), str(folder)]
        command.append(str(patience.MOST * limit))
        port = _free_port()
        workers = [_start(command, rank, processes, port, folder) for rank in range(processes)]
        _wait(workers, patience.Limit(limit), folder)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]

    return run


def _start(command: list[str], rank: int, processes: int, port: int, folder: Path) -> ForkServerProcess:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    worker = _FORKS.Process(target=forked, args=(environment, str(folder), str(folder / f"{rank}.log"), command))
    worker.start()
    return worker


def _wait(workers: list[ForkServerProcess], limit: patience.Limit, folder: Path) -> None:
    """Waits for all workers; ends all of them as soon as one fails, since the rest would wait for it."""
    try:
        while any(worker.exitcode is None for worker in workers) and not limit.passed():
            if any(worker.exitcode not in (None, 0) for worker in workers):
                break
            time.sleep(0.02)
        codes = [worker.exitcode for worker in workers]
        if limit.passed():
            _tell_where_they_hang(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    logs = "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.log').read_text()[-6000:]}" for rank in range(len(codes)))
    assert all(code == 0 for code in codes), f"exit codes {codes} (None: still running at the time limit)\n{logs}"


def _tell_where_they_hang(workers: list[ForkServerProcess]) -> None:
    for worker in workers:
        if worker.exitcode is None and worker.pid is not None:
            os.kill(worker.pid, STACKS)
    time.sleep(1)  # the stacks are written by a handler in C, which needs no lock


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
