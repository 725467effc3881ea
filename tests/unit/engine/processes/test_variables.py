"""Numbers in variables of launchers: Slurm's, torchrun's and ours are read by the same rule."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from engine.processes import process_group
from engine.processes.variables import LaunchError, number_in
from launcher.slurm.allocation import read_allocation
from launcher.start.discovery import from_slurm


def test_a_number() -> None:
    assert number_in({"RANK": "007"}, "RANK", most=7) == 7
    assert number_in({}, "RANK", least=1, absent=3) == 3


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1.0", "1_0", "one", "²", "٣", "8", "0" * 21, "9" * 5000])
def test_what_is_no_such_number_is_named(text: str) -> None:
    with pytest.raises(LaunchError, match=r"RANK: got .*; allowed are numbers from 0 to 7; mend it where the launcher"):
        number_in({"RANK": text}, "RANK", most=7)


def test_a_number_that_has_to_be_there() -> None:
    with pytest.raises(LaunchError, match="RANK: got nothing; allowed are numbers from 0 to 4294967295"):
        number_in({}, "RANK")


JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1"}
STEP = {
    **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
    **{"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "6"},
}


@pytest.mark.parametrize(
    ("read", "variables", "name"),
    [
        *((read_allocation, JOB, name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID")),
        *((from_slurm, STEP, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID")),
    ],
)
def test_variables_of_slurm(read: Callable[[Mapping[str, str]], Any], variables: dict[str, str], name: str) -> None:
    read(variables)
    with pytest.raises(LaunchError, match=f"{name}: got two; allowed are numbers from 0"):
        read({**variables, name: "two"})


@pytest.mark.parametrize(
    ("name", "read"),
    [("WORLD_SIZE", process_group.launched_processes), ("LOCAL_WORLD_SIZE", process_group.local_processes)],
)
def test_numbers_of_processes(monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[], int]) -> None:
    monkeypatch.setattr(os, "environ", {name: "3"})
    assert read() == 3
    os.environ[name] = "0"
    with pytest.raises(LaunchError, match=f"{name}: got 0; allowed are numbers from 1"):
        read()
