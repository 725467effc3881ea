"""A run that is changed on its way, under ZeRO-3 and in a pipeline: from that step on it equals a plain one so changed.

``tests/integration/test_amend.py`` shows by hand what the plain one does.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.plan.parse import parse_plan
from engine.processes import ranks
from engine.run.earlier import Start
from engine.run.entrance import RunOptions
from engine.run.train import train
from engine.telemetry.metrics import read_metrics

pytestmark = pytest.mark.distributed

PLAN = """
name: amended
seed: 3
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 2, text_layers: 1, alignment_layers: 1,
  generation_layers: 1, projection_size: 8, image_size: 32, video_size: 32, patch_size: 16, num_frames: 2}
parallel: {host: plain, precision: fp32}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}
logging: {every: 1, tensorboard: false}
checkpoint: {every: 2}
stages:
  - name: one
    steps: 3
    data:
      - {source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}
      - {source: motion, kind: video_text}
    objectives: [mlm, {kind: univlc, queue_size: 24}]
    optimizer: {lr: 1e-3, warmup_steps: 2, eps: 1e-3}  # rounding noise is not blown up to a full step
"""

ALONE = ("parallel.host=plain", "launch.processes=1")
HALVES = ("launch.processes=2", "batch.micro_batch_size_per_gpu=2", "parallel.host=zero", "parallel.zero_stage=3")
PIPELINE = ("launch.processes=2", "parallel.host=pipeline", "parallel.pipeline_stages=2", "parallel.zero_stage=1")
LAYOUTS = {"alone": ALONE, "zero3": HALVES, "pipeline": PIPELINE}

LONGER = ("stages.one.steps=6", "stages.one.optimizer.lr=3e-3")
OTHERWISE = (
    *("stages.one.optimizer.weight_decay=0.3", "stages.one.optimizer.layer_decay=0.5"),
    *("stages.one.optimizer.gradient_clipping=0.3", "stages.one.objectives.mlm.weight=0.5"),
)

Turn = tuple[str, Sequence[str], bool]
"""Folder, overrides, whether they change the run."""


def run_starts(starts: Sequence[Turn]) -> list[int]:
    """Worker: one start after the other."""
    return [
        train(
            parse_plan(PLAN, overrides=overrides, world_size=ranks.world_size()),
            RunOptions(Path(folder), Start(amend=amend), offline=True),
            torch.device("cpu"),
        )
        for folder, overrides, amend in starts
    ]


def amended(folder: Path, before: str, now: str, changed: Sequence[str]) -> list[Turn]:
    """A run that ends under one layout, and goes on changed under another."""
    return [(str(folder), LAYOUTS[before], False), (str(folder), (*LAYOUTS[now], *changed), True)]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "stages/01-one/metrics.jsonl") if line["event"] == "train"]


def cosine(lr: float, step: int, steps: int, warmup: int = 2) -> float:
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


RATES = [5e-4, 1e-3, 1e-3, *(cosine(3e-3, step, 6) for step in (3, 4, 5))]
"""Of each step: three of a cosine over three with a warm-up of two, three of one over six with a peak of its own."""


def assert_equal_runs(
    got: Path, expected: Path, *, loss: float = 1e-4, norm: float = 1e-3, weight: float = 1e-4
) -> None:
    """Losses, rates and norms of every step, and the weights at the end, to rounding."""
    ours, theirs = lines_of(got), lines_of(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        where = f"{got.name}, step {one['step']}"
        assert one["lr"] == other["lr"], where
        assert one["losses"] == pytest.approx(other["losses"], rel=loss), where
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=norm), where
    weights = [load_file(folder / "stages/01-one/weights.safetensors") for folder in (got, expected)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=10 * weight, atol=weight, msg=f"{got.name}: {name}")


def check_amended(
    run_distributed: Any, folder: Path, runs: dict[str, tuple[str, str]], changed: Sequence[str]
) -> list[dict[str, float]]:
    """Amends a run of one process and runs that go from one layout to another, and compares them.

    Returns:
        The learning rates of each step, by group.
    """
    run_distributed(run_starts, processes=1, starts=amended(folder / "alone", "alone", "alone", changed))
    shared = [start for name, layouts in runs.items() for start in amended(folder / name, *layouts, changed)]
    run_distributed(run_starts, processes=2, limit=60 * len(runs), starts=shared)
    for name in runs:
        assert_equal_runs(folder / name, folder / "alone")
        (entry,) = json.loads((folder / name / "amendments.json").read_text())
        assert entry["steps"] == {"one": 3}
    return [line["lr"] for line in lines_of(folder / "alone")]


def test_a_longer_run_of_a_new_rate_under_zero(run_distributed: Any, tmp_path: Path) -> None:
    """A complete cosine becomes longer, with a higher rate, under ZeRO-3 as under no host."""
    rates = check_amended(run_distributed, tmp_path, {"zero": ("zero3", "zero3")}, LONGER)
    assert [rate["decay"] for rate in rates] == pytest.approx(RATES)


@pytest.mark.full
def test_every_layout_takes_every_change(run_distributed: Any, tmp_path: Path) -> None:
    """Groups of the optimizer, clipping and the weights of losses too; resumed where it was, and elsewhere."""
    layouts = ("zero3", "pipeline")
    runs = {f"{before}-{now}": (before, now) for before in layouts for now in layouts}
    rates = check_amended(run_distributed, tmp_path, runs, (*LONGER, *OTHERWISE))
    assert rates[-1]["decay"] == pytest.approx(RATES[-1])
    assert len(rates[0]) == 2 < len(rates[-1]), "layers have factors now"


@pytest.mark.full
def test_fewer_steps_in_another_precision(run_distributed: Any, tmp_path: Path) -> None:
    """A run that was killed before its end becomes shorter, and goes on in bf16 under another layout."""
    long = "stages.one.steps=6"
    changed = ("stages.one.steps=5", "parallel.precision=bf16", "stages.one.optimizer.schedule=linear")
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run_distributed(run_starts, processes=1, starts=[(str(alone), (*ALONE, long), False)])
    run_distributed(run_starts, processes=2, starts=[(str(moved), (*HALVES, long), False)])
    for folder in (alone, moved):
        stage = folder / "stages/01-one"
        (stage / "complete.json").unlink()
        shutil.rmtree(stage / "checkpoints/step-000006")
    run_distributed(run_starts, processes=1, starts=[(str(alone), (*ALONE, *changed), True)])
    run_distributed(run_starts, processes=2, starts=[(str(moved), (*PIPELINE, *changed), True)])
    # Eight bits of mantissa in one step.
    assert_equal_runs(moved, alone, loss=2e-2, norm=0.1, weight=5e-3)
    rates = [line["lr"]["decay"] for line in lines_of(alone)]
    assert rates == pytest.approx([5e-4, 1e-3, *(cosine(1e-3, step, 6) for step in (2, 3)), 1e-3 / 3])
