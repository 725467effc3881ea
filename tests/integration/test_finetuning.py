"""A stage that fine-tunes an earlier one: other sizes, a new head with its own rate, and the best checkpoint."""

import json
from typing import TYPE_CHECKING

import pytest

from engine.disk.trained import find_trained
from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PLAN = """
name: tuned
model: {preset: MODEL, text_length: 16}
parallel: {host: HOST}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 4}
logging: {every: 1}
checkpoint: {every: 100, keep_last: 1, keep_best: sentiment/MAE}
stages:
  - name: before
    steps: 2
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, univlc, vlm]
  - name: sentiment
    init_from: before
    steps: 8
    model: {image_size: 64, video_size: 48, num_frames: 6, text_length: 24}
    data: [{source: scenes, kind: video_text, fields: [sentiment], where: {task: [sentiment], part: [train]}}]
    objectives: [univlc, vlm, regress]
    optimizer: {lr: 1e-3, schedule: constant, new_head_lr_scale: 10}
    evaluate:
      every: 2
      tasks: [{kind: sentiment, max_samples: 8, where: {task: [sentiment], part: [test]}}]
  - name: options
    init_from: sentiment
    steps: 6
    data: [{source: scenes, kind: image_text, fields: [options, option], where: {task: [reasons], part: [train]}}]
    objectives: [choose]
    optimizer: {lr: 1e-2, schedule: constant}
    evaluate:
      every: 2
      keep_best: options/mean rank
      tasks: [{kind: options, max_samples: 8, where: {task: [reasons], part: [test]}}]
"""


@pytest.mark.parametrize(
    "host", ["plain", pytest.param("zero, zero_stage: 3", marks=[pytest.mark.distributed, pytest.mark.full])]
)
def test_a_tuned_stage_keeps_the_checkpoint_with_the_lowest_error(pretraining: "Pretraining", host: str) -> None:
    pretraining.write_plan(PLAN.replace("HOST", host))
    pretraining.run("run", limit=240)
    stage = pretraining.stage("run", "02-sentiment")
    report = json.loads((stage / "handover.json").read_text())
    assert set(report["resized"]) == {
        f"embed.block.{one}" for one in ("visual.positions", "visual.times", "text.positions")
    }
    assert {name.split(".")[2] for name in report["created"]} == {"regress"}
    lines = list(read_metrics(stage / "metrics.jsonl"))
    rates = next(line["lr"] for line in lines if line["event"] == "train")
    assert rates == {"decay": 1e-3, "no_decay": 1e-3, "decay_x10": 1e-2, "no_decay_x10": 1e-2}, "VLM's head is carried"
    for name, figure in (("02-sentiment", "sentiment/MAE"), ("03-options", "options/mean rank")):
        folder = pretraining.stage("run", name)
        found = {
            line["step"]: line["scores"][figure]
            for line in read_metrics(folder / "metrics.jsonl")
            if line["event"] == "evaluation"
        }
        lowest = min(found, key=lambda step: (found[step], step))
        kept = {int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")}
        assert kept == {lowest, max(found)}, found
        trained = find_trained(folder / "checkpoints" / f"step-{lowest:06d}")
        assert (trained.stage.name, trained.step) == (name[3:], lowest), "what evaluate and export read"
