"""``omnivl pretrain`` under other launchers than its own: unchanged, and with the same result to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from engine.metrics import comparable, read_metrics
from engine.run_folder import RunFolder, RunFolderError
from launcher.discovery import free_port

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(300)]

SCRIPTS = Path(sys.executable).parent
COMMAND = ("-m", "launcher.cli", "pretrain")
LAUNCHERS = {
    "torchrun": (str(SCRIPTS / "torchrun"), "--standalone", "--nproc_per_node=2", "--no_python", sys.executable),
    "deepspeed": (str(SCRIPTS / "deepspeed"), "--num_accelerators=2", "--no_local_rank", "--no_python", sys.executable),
    "mpirun": (str(SCRIPTS / "mpirun"), "-n", "2", "--oversubscribe", sys.executable),
}
LAYOUT = ("parallel.host=zero", "parallel.zero_stage=3", "logging.every=1", "stages.spatial.steps=4")


PDSH = """#!/bin/bash
# Runs the command on each of the machines of -w, all of which are this one, as pdsh does: %n is the machine's number.
while [ "$1" != -w ]; do shift; done
IFS=, read -ra machines <<< "$2"; shift 2
code=0 started=()
for number in "${!machines[@]}"; do command="$*"; bash -c "${command//%n/$number}" & started+=($!); done
for one in "${started[@]}"; do wait "$one" || code=$?; done
exit "$code"
"""
SSH = """#!/bin/bash
case "$*" in *"hostname -I") echo 127.0.0.1 ;; *" hostname") echo "${@: -2:1}" ;; *) exit 255 ;; esac
"""


def launch(runs: "Pretraining", launcher: Sequence[str], name: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PATH": os.pathsep.join([str(runs.folder), str(SCRIPTS), os.environ["PATH"]]),
    }
    return subprocess.Popen(
        [*launcher, *COMMAND, str(runs.plan), "--run-folder", str(runs.folder / name), *arguments],
        env=environment,
        cwd=runs.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "name",
    ["mpirun", pytest.param("torchrun", marks=pytest.mark.full), pytest.param("deepspeed", marks=pytest.mark.full)],
)
def test_other_launcher_gives_the_same_run(pretraining: "Pretraining", name: str) -> None:
    launcher = LAUNCHERS[name]
    if not Path(launcher[0]).is_file():
        pytest.skip(f"{name} is not installed in {SCRIPTS}")
    if name == "deepspeed":
        launcher = (launcher[0], f"--master_port={free_port()}", *launcher[1:])
    process = launch(pretraining, launcher, name, *LAYOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    pretraining.run("own", *LAYOUT, "launch.processes=2")
    stages = [pretraining.stage("own"), pretraining.stage(name)]
    lines = [[comparable(line) for line in read_metrics(stage / "metrics.jsonl")] for stage in stages]
    assert len(lines[1]) == 4 and lines[0] == lines[1]
    weights = [load_file(stage / "weights.safetensors") for stage in stages]
    assert not pretraining.differences(*weights)


@pytest.mark.full
def test_hostfile_starts_ranks_on_each_machine(pretraining: "Pretraining") -> None:
    """Through commands that stand in for pdsh and ssh, and reach this machine under two names."""
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (pretraining.folder / name).write_text(text)
        (pretraining.folder / name).chmod(0o755)
    hostfile = pretraining.folder / "hosts"
    hostfile.write_text("# two machines\nalpha slots=1\nbeta slots=1\n")
    arguments = ("parallel.host=zero", "logging.every=1", "stages.spatial.steps=2", "--hostfile", str(hostfile))
    process = launch(pretraining, [sys.executable], "run", *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    assert json.loads((pretraining.folder / "run" / "environment.json").read_text())["processes"] == 2
    assert [line["step"] for line in read_metrics(pretraining.stage("run") / "metrics.jsonl")] == [1, 2]

    process = launch(pretraining, [sys.executable], "a b", *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "which a shell on the other machines would take apart" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_signals_reach_ranks_of_mpirun(pretraining: "Pretraining", number: signal.Signals) -> None:
    """mpirun ends at once and kills what it has started: ranks save all the same. USR1 it passes on, and waits."""
    if not Path(LAUNCHERS["mpirun"][0]).is_file():
        pytest.skip(f"mpirun is not installed in {SCRIPTS}")
    arguments = ("parallel.host=zero", "logging.every=1", "stages.spatial.steps=400", "checkpoint.every=1000")
    stage = pretraining.stage("run")
    metrics = stage / "metrics.jsonl"
    process = launch(pretraining, LAUNCHERS["mpirun"], "run", *arguments)
    _wait_for_lines(process, metrics, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    _wait_for_end(pretraining.folder / "run")
    first = _saved_step(stage)
    before = read_metrics(metrics)
    assert len(before) == first, output[-4000:]

    process = launch(pretraining, LAUNCHERS["mpirun"], "run", *arguments)
    _wait_for_lines(process, metrics, first + 1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, output[-4000:]
    after = read_metrics(metrics)
    assert _saved_step(stage) == len(after) > first
    assert after[:first] == before, "also the times: it went on, and did not begin anew"


def test_mpirun_ends_with_a_killed_rank(pretraining: "Pretraining") -> None:
    """The rank is named, its code is mpirun's, and no other one is left."""
    if not Path(LAUNCHERS["mpirun"][0]).is_file():
        pytest.skip(f"mpirun is not installed in {SCRIPTS}")
    arguments = ("parallel.host=zero", "logging.every=1", "stages.spatial.steps=400", "checkpoint.every=1000")
    process = launch(pretraining, LAUNCHERS["mpirun"], "run", *arguments)
    _wait_for_lines(process, pretraining.stage("run") / "metrics.jsonl", 2)
    ranks = [_worker(process.pid, rank) for rank in (0, 1)]
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output[-4000:]
    assert "rank 1 was ended by SIGKILL" in output and "Killed" in output
    deadline = time.monotonic() + 30
    while Path(f"/proc/{ranks[0]}").exists():
        assert time.monotonic() < deadline, "rank 0 is left"
        time.sleep(0.05)


def _wait_for_end(folder: Path) -> None:
    """Waits until no process writes into a run's folder any more."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with RunFolder(folder).lock():
                return
        except RunFolderError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _saved_step(stage: Path) -> int:
    checkpoint = max((stage / "checkpoints").glob("step-*"))
    return int(checkpoint.name.removeprefix("step-"))


def _wait_for_lines(process: "subprocess.Popen[str]", metrics: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < count:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"no line {count} in {metrics}"
        time.sleep(0.05)


def _worker(mpirun: int, rank: int) -> int:
    """The process that trains as a rank: the child of mpirun's child with that number."""
    wanted = f"OMPI_COMM_WORLD_RANK={rank}".encode()
    for child in _children(mpirun):
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            (worker,) = _children(child)
            return worker
    raise AssertionError(f"mpirun has no rank {rank}")


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
