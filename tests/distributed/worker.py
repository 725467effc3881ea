"""One process of a distributed test: joins the process group, calls a function, stores what it returns.

Tests fork it from a server with the common imports (``conftest.py``); tests of one process on a GPU start it as a
program: FILE FUNCTION ARGUMENTS.json RESULTS SECONDS.
"""

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.processes.process_group import finish, join_process_group

STACKS = signal.SIGUSR2
"""Has a worker write the stacks of its threads."""

RunDistributed = Callable[..., list[Any]]
"""What the fixture ``run_distributed`` gives."""


def work(file: str, function: str, arguments: str, results: str, seconds: str) -> None:
    """Calls ``function`` of ``file`` and leaves without interpreter shutdown."""
    faulthandler.dump_traceback_later(float(seconds), exit=True)  # says where a worker hangs
    faulthandler.register(STACKS, all_threads=True)
    here = Path(__file__).parent
    sys.path[:0] = [str(Path(file).parent), str(here), str(here.parent)]
    torch.set_num_threads(1)
    try:
        join_process_group(timeout_seconds=int(float(seconds)), always=True)
        spec = importlib.util.spec_from_file_location("worker_module", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["worker_module"] = module
        spec.loader.exec_module(module)
        result = getattr(module, function)(**json.loads(Path(arguments).read_text()))
        torch.save(result, Path(results) / f"{dist.get_rank()}.pt")
    except BaseException:
        traceback.print_exc()
        finish(1)
    finish()


def forked(environment: Mapping[str, str], folder: str, log: str, command: list[str]) -> None:
    """``work`` in a process of the server: takes over the environment, the folder and the log first."""
    os.environ.update(environment)
    os.chdir(folder)
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    work(*command)


if __name__ == "__main__":
    work(*sys.argv[1:])
