"""Ranks under supervision, and ranks whose launcher ends before them: small processes stand in for both."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import patience
import pytest

from engine.watch.failure import FAILURE_FILE, read_told

RANK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: (open("stopped", "w").close(), os._exit(143)))
print("rank of", os.getppid(), "is", os.getpid(), flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""
ABANDONING = """
import os, subprocess, sys, time
code = "import launcher.start.supervisor as s; s.follow_launcher(); import rank"
subprocess.Popen([sys.executable, "-c", code, "wait"])
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def start(folder: Path, *command: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "RANK": "3", FAILURE_FILE: str(folder / "failure")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(process: "subprocess.Popen[str]") -> Sequence[int]:
    """Numbers of the process that a rank says has started it, and of the rank."""
    assert process.stdout is not None
    words = process.stdout.readline().split()
    return int(words[2]), int(words[4])


def wait_for(path: Path) -> None:
    patience.wait_for(path.exists, 20, f"no {path}")


def test_exit_code_is_the_ranks(folder: Path) -> None:
    process = start(folder, "-m", "launcher.start.supervisor", "rank", "7")
    supervisor, rank = started(process)
    assert supervisor == process.pid != rank
    assert process.wait(20) == 7
    assert read_told(folder / "failure") is None, "a rank that ends by itself has said why"


def test_signals_are_passed_on(folder: Path) -> None:
    process = start(folder, "-m", "launcher.start.supervisor", "rank", "wait")
    started(process)
    process.terminate()
    assert process.wait(20) == 143
    assert (folder / "stopped").exists()


def test_killed_rank_is_told_of_and_ends_its_supervisor_alike(folder: Path) -> None:
    process = start(folder, "-m", "launcher.start.supervisor", "rank", "wait")
    _, rank = started(process)
    os.kill(rank, signal.SIGKILL)
    _, said = patience.communicate(process, 20)
    assert process.returncode == -signal.SIGKILL
    told = read_told(folder / "failure")
    assert told is not None and (told.rank, told.code) == (3, 128 + signal.SIGKILL)
    assert told.said.startswith("rank 3 was ended by SIGKILL on ") and told.said in said


def test_rank_stops_when_its_supervisor_is_killed(folder: Path) -> None:
    process = start(folder, "-m", "launcher.start.supervisor", "rank", "wait")
    started(process)
    process.kill()
    process.wait(20)
    wait_for(folder / "stopped")


def test_rank_stops_when_its_launcher_is_gone(folder: Path) -> None:
    process = start(folder, "-c", ABANDONING)
    started(process)
    process.kill()
    process.wait(20)
    wait_for(folder / "stopped")


def test_failure_that_a_full_disk_has_cut_off_is_none(tmp_path: Path) -> None:
    for text in ("", '{"code": 1, "sa'):
        (tmp_path / "failure").write_text(text)
        assert read_told(tmp_path / "failure") is None
