"""Starts the worker processes of distributed tests."""

import json
import multiprocessing
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from worker import RunDistributed, forked

# Workers are forked from a process that has imported what takes seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["engine.run.train", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"])


@pytest.fixture
def run_distributed(tmp_path: Path) -> RunDistributed:
    """``run_distributed(function, processes=2, timeout=120, **arguments)`` -> what each rank returned.

    ``function`` stands at the top of a test file; it is called in fresh processes that have joined a gloo group.
    Arguments are JSON. A process that fails or hangs fails the test with its output.
    """
    started: list[int] = []

    def run(function: Callable[..., Any], *, processes: int, timeout: float = 120, **arguments: Any) -> list[Any]:
        folder = tmp_path / f"run{len(started)}"
        started.append(processes)
        folder.mkdir()
        (folder / "arguments.json").write_text(json.dumps(arguments))
        command = [function.__code__.co_filename, function.__name__, str(folder / "arguments.json"), str(folder)]
        command.append(str(timeout))
        port = _free_port()
        workers = [_start(command, rank, processes, port, folder) for rank in range(processes)]
        _wait(workers, time.monotonic() + timeout + 5, folder)
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


def _wait(workers: list[ForkServerProcess], deadline: float, folder: Path) -> None:
    """Waits for all workers; ends all of them as soon as one fails, since the rest would wait for it."""
    try:
        while any(worker.exitcode is None for worker in workers) and time.monotonic() < deadline:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                break
            time.sleep(0.02)
        codes = [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    logs = "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.log').read_text()[-6000:]}" for rank in range(len(codes)))
    assert all(code == 0 for code in codes), f"exit codes {codes} (None: still running at the time limit)\n{logs}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
