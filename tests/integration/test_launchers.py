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

import patience
import psutil
import pytest
from metric_lines import comparable_lines
from safetensors.torch import load_file

from engine.disk.run_folder import RunFolder, RunFolderError
from engine.telemetry.metrics import read_metrics
from engine.watch.heartbeat import read_sign
from launcher.start.discovery import free_port

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
    process = launch(pretraining, _installed(name), name, *LAYOUT)
    output, _ = patience.communicate(process, 120)
    assert process.returncode == 0, output[-4000:]
    pretraining.run("own", *LAYOUT, "launch.processes=2")
    stages = [pretraining.stage("own"), pretraining.stage(name)]
    lines = [comparable_lines(stage / "metrics.jsonl") for stage in stages]
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
    output, _ = patience.communicate(process, 120)
    assert process.returncode == 0, output[-4000:]
    assert json.loads((pretraining.folder / "run" / "environment.json").read_text())["processes"] == 2
    assert [line["step"] for line in read_metrics(pretraining.stage("run") / "metrics.jsonl")] == [1, 2]

    process = launch(pretraining, [sys.executable], "a b", *arguments)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == 2
    assert "which a shell on the other machines would take apart" in output


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        pytest.param(name, number, code, marks=() if (name, number) == ("mpirun", signal.SIGTERM) else pytest.mark.full)
        for name, codes in {"torchrun": (1, 1, -10), "deepspeed": (-15, -2, -10), "mpirun": (1, 1, 138)}.items()
        for number, code in zip((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), codes, strict=True)
    ],
)
def test_signals_reach_ranks(pretraining: "Pretraining", name: str, number: signal.Signals, code: int) -> None:
    """Whether a launcher passes a signal on, ends and leaves its ranks behind, or kills them: they save."""
    launcher, arguments = _installed(name), ("stages.spatial.steps=60", *_SAVED_AT_SIGNALS)
    stage = pretraining.stage("run")
    process = launch(pretraining, launcher, "run", *arguments)
    _wait_for_lines(process, stage / "metrics.jsonl", 2)
    process.send_signal(number)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == code, output[-4000:]
    _wait_for_end(pretraining.folder / "run")
    before = read_metrics(stage / "metrics.jsonl")
    (checkpoint,) = (stage / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{len(before):06d}", output[-4000:]

    process = launch(pretraining, launcher, "run", *arguments)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == 0, output[-4000:]
    after = read_metrics(stage / "metrics.jsonl")
    assert len(after) == 60 > len(before)
    assert after[: len(before)] == before, "also the times: it went on, and did not begin anew"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("mpirun", 128 + signal.SIGKILL),
        pytest.param("torchrun", 1, marks=pytest.mark.full),
        pytest.param("deepspeed", 256 - signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_killed_rank_ends_the_others(pretraining: "Pretraining", name: str, code: int) -> None:
    """The exit code is what the launcher makes of the killed rank's. No process is left, of data workers either."""
    arguments = ("stages.spatial.steps=400", "loader.num_workers=1", *_SAVED_AT_SIGNALS)
    process = launch(pretraining, _installed(name), "run", *arguments)
    _wait_for_lines(process, pretraining.stage("run") / "metrics.jsonl", 2)
    started = psutil.Process(process.pid).children(recursive=True)
    sign = read_sign(RunFolder(pretraining.folder / "run").heartbeats, 1)
    assert sign is not None and sign.process in {child.pid for child in started}
    assert psutil.Process(sign.process).children(recursive=True)
    os.kill(sign.process, signal.SIGKILL)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == code, output[-4000:]
    assert name != "mpirun" or ("rank 1 was ended by SIGKILL" in output and "Killed" in output)
    _, left = psutil.wait_procs(started, timeout=patience.seconds(30))
    assert not left


_SAVED_AT_SIGNALS = ("parallel.host=zero", "logging.every=1", "checkpoint.every=1000")


def _installed(name: str) -> Sequence[str]:
    launcher = LAUNCHERS[name]
    if not Path(launcher[0]).is_file():
        pytest.skip(f"{name} is not installed in {SCRIPTS}")
    return (launcher[0], f"--master_port={free_port()}", *launcher[1:]) if name == "deepspeed" else launcher


def _wait_for_end(folder: Path) -> None:
    """Waits until no process writes into a run's folder any more."""
    limit = patience.Limit(60)
    while True:
        try:
            with RunFolder(folder).lock():
                return
        except RunFolderError:
            assert not limit.passed()
            time.sleep(0.05)


def _wait_for_lines(process: "subprocess.Popen[str]", metrics: Path, count: int) -> None:
    limit = patience.Limit(120)
    while len(read_metrics(metrics)) < count:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert not limit.passed(), f"no line {count} in {metrics}"
        time.sleep(0.05)
