"""Ranks from the variables of other launchers."""

import os
import socket
import sys

import pytest

from launcher.start.discovery import free_port, from_slurm, interface_towards, join_launch
from launcher.start.nodes import rendezvous_port
from omnivl.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[3-4,9]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of nothing but what a test puts in, which does not outlive it."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return monkeypatch


def test_ranks_of_srun() -> None:
    assert from_slurm(SLURM) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu3",
        "MASTER_PORT": str(rendezvous_port(77, 2)),
    }


def test_address_that_the_job_has_chosen_stays(environment: pytest.MonkeyPatch) -> None:
    os.environ.update({**SLURM, "MASTER_PORT": "4444", "GLOO_SOCKET_IFNAME": "ib0"})
    assert join_launch()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"], os.environ["GLOO_SOCKET_IFNAME"]) == ("5", "4444", "ib0")


def test_shell_within_a_job_is_no_rank(environment: pytest.MonkeyPatch) -> None:
    """``srun --pty bash`` is a step of one task, in which somebody calls ``omnivl pretrain``."""
    os.environ.update({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu3"})
    assert not join_launch()
    assert join_launch(by_hand=False) and os.environ["WORLD_SIZE"] == "1"


def test_ranks_of_deepspeed(environment: pytest.MonkeyPatch) -> None:
    os.environ.update({"RANK": "3", "LOCAL_SIZE": "2"})
    assert join_launch() and os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_no_launcher(environment: pytest.MonkeyPatch) -> None:
    assert not join_launch() and "RANK" not in os.environ


def test_mpirun_without_mpi4py(environment: pytest.MonkeyPatch) -> None:
    os.environ["OMPI_COMM_WORLD_SIZE"] = "4"
    environment.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="mpirun: got 4 processes, and no mpi4py"):
        join_launch()


def test_free_port_passes_a_taken_one_over() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port(port) <= port + 100


def test_loopback_is_no_interface_towards_others() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no-such-host.invalid") is None
