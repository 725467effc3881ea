"""Starts ``omnivl pretrain`` on a plan of a few seconds and reads the files of the run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patience
import pytest
import torch
from metric_lines import comparable_lines
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

TINY_PLAN = """
name: tiny
seed: 3
model: {preset: MODEL, dropout: 0.1, drop_path: 0.1}
parallel: {host: plain, precision: fp32}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}
logging: {every: 2, tensorboard: false}
checkpoint: {every: 3, keep_last: 2}
stages:
  - name: spatial
    steps: 10
    data:
      - {source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}
      - {source: motion, kind: video_text}
    objectives:
      - mlm
      - {kind: univlc, queue_size: 24, batch_keys: momentum}
    optimizer: {lr: 1e-3, warmup_steps: 2}
"""


def _differences(one: object, other: object, path: str = "") -> list[str]:
    """Paths at which two trees of containers and tensors differ in any bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(str(key), one.get(key), other.get(key)) for key in {**one, **other}]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    elif hasattr(one, "__dict__") and type(one) is type(other) and type(one).__module__.startswith("deepspeed"):
        pairs = [("", vars(one), vars(other))]
    else:
        return [] if one == other else [f"{path}: {one!r} / {other!r}"[:200]]
    return [found for key, left, right in pairs for found in _differences(left, right, f"{path}/{key}")]


def _final_state(stage: Path) -> dict[str, Any]:
    """Everything that a stage leaves behind but times. Position in the data and generators are among the tensors."""
    checkpoint = max((stage / "checkpoints").glob("step-*"))
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    return {
        "weights": load_file(stage / "weights.safetensors"),
        "host": {file.name: load_file(file) for file in files if file.suffix == ".safetensors"},
        "step": json.loads((checkpoint / "trainer.json").read_text())["step"],
        "metrics": comparable_lines(stage / "metrics.jsonl"),
    }


class Pretraining:
    """Runs of ``omnivl pretrain``; whatever is still running at the end of the test is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = folder / "plan.yaml"
        self.write_plan(TINY_PLAN)
        self._started: list[subprocess.Popen[str]] = []

    def write_plan(self, text: str) -> None:
        self.plan.write_text(text.replace("MODEL", str(ROOT / "configs" / "models" / "debug.yaml")))

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launcher.cli", "pretrain", str(self.plan), *arguments]
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        process = subprocess.Popen(
            [*command, "--run-folder", str(self.folder / name)],
            env=environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, name: str, *arguments: str, code: int = 0, limit: float = 120) -> str:
        process = self.start(name, *arguments)
        output, _ = patience.communicate(process, limit)
        assert process.returncode == code, output[-6000:]
        return output

    def run_until(
        self, name: str, condition: Callable[[], bool], number: int, *arguments: str, limit: float = 120
    ) -> subprocess.Popen[str]:
        """Starts a run and sends a signal to all of its processes as soon as the condition holds."""
        process = self.start(name, *arguments)
        running = patience.Limit(limit)
        while not condition():
            assert process.poll() is None, f"ended before the condition held:\n{process.communicate()[0][-6000:]}"
            assert not running.passed(), "the condition never held"
            time.sleep(0.002)
        os.killpg(process.pid, number)
        return process

    def stage(self, name: str, stage: str = "01-spatial") -> Path:
        return self.folder / name / "stages" / stage

    differences = staticmethod(_differences)
    final_state = staticmethod(_final_state)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def pretraining(tmp_path: Path) -> Iterator[Pretraining]:
    runs = Pretraining(tmp_path)
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def shared_pretraining(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretraining]:
    """For runs that several tests of a file compare theirs with."""
    runs = Pretraining(tmp_path_factory.mktemp("shared"))
    yield runs
    runs.close()
