"""Settings of all tests: one thread per process, the CPU unless a test asks for a GPU, skips with their reason."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch or DeepSpeed are imported anywhere, in this process or in one that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The width of whoever looks on, which pytest-xdist hands to its workers, is none of the tests'.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)
# Processes that tests start elsewhere find this tree. An empty entry would be the folder that they start in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

# Processes that tests start keep what they compile of this tree, so that not each of them compiles it anew (0.3 s).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import patience
import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and all that these start in turn.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests that take long")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: a compressed file holds the second of its making, and pytest-xdist wants equal names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    return patience.set_timer(item, settings)


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    full = None if config.getoption("--full") else "takes long, runs under `make test-full`"
    reasons = {"gpu": _why_no_gpu(), "slurm": _why_no_slurm(), "full": full}
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device, and there is none"


def _why_no_slurm() -> str | None:
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} of Debian's slurmctld, slurmd, slurm-client, munge and iproute2"
    if os.geteuid() != 0:
        return "needs root, to start a Slurm of its own"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--ipc", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "needs network namespaces, which this container may not make"
