"""What two processes on one machine listen on, and how a launch with a wrong number ends."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import patience
import psutil
import pytest
import torch
import torch.distributed as dist

from engine.processes.belonging import SECRET

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def addresses_listened_on() -> dict[str, Any]:
    """Worker: where this process listens, after a collective and a further group, and what it passes on."""
    dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1]))
    own = [one for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    dist.barrier()
    return {"addresses": sorted({one.laddr.ip for one in own}), "secret": os.environ.get(SECRET)}


def test_one_machine_listens_on_its_loopback_alone(run_distributed: Any) -> None:
    first, second = run_distributed(addresses_listened_on, processes=2)
    assert first == {"addresses": ["127.0.0.1"], "secret": None}  # the store, and gloo
    assert set(second["addresses"]) <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "2"}, "RANK: got 2; allowed are numbers from 0 to 1"),
        ({"RANK": "1"}, "rank 1: no rendezvous at 127.0.0.1, port 9 within 4 s: nothing answers there"),
    ],
)
def test_a_launch_that_cannot_meet_ends_in_time(tmp_path: Path, changed: dict[str, str], said: str) -> None:
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    environment = {**os.environ, "LOCAL_RANK": "0", **variables, **changed, "PYTHONPATH": str(ROOT)}
    plan = ROOT / "configs" / "plans" / "quickstart.yaml"
    command = [sys.executable, "-m", "launcher.start.worker", "--run-folder", str(tmp_path / "run"), "--", str(plan)]
    began = time.monotonic()
    ended = patience.run(
        [*command, "launch.timeout_seconds=4"],
        env=environment,
        capture_output=True,
        text=True,
        limit=100,
        check=False,
    )
    assert (ended.returncode, said in ended.stderr) == (1, True), ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr.split(said)[1]
    assert time.monotonic() - began < patience.seconds(60)  # most of it imports
    assert not (tmp_path / "run").exists()
