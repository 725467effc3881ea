"""A run whose plan says ``parallel: auto``: all processes take one layout, say why, and keep it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.plan.parse import parse_plan
from engine.run.automatic import with_layouts
from engine.run.earlier import Start
from engine.run.entrance import RunOptions
from engine.run.train import train

pytestmark = pytest.mark.distributed

PLAN = """
name: auto
seed: 3
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 2, text_layers: 1, alignment_layers: 1,
  generation_layers: 0, projection_size: 8, image_size: 32, video_size: 32, patch_size: 16, num_frames: 2}
parallel: auto
batch: {global_batch_size: 16}
logging: {every: 1, tensorboard: false}
stages:
  - name: spatial
    steps: 2
    data: [{source: emoji, kind: image_text}]
    objectives: [mlm, univlc]
    optimizer: {lr: 1e-3}
  - name: temporal
    init_from: spatial
    steps: 2
    parallel: {host: zero, zero_stage: 2}
    data: [{source: motion, kind: video_text}]
    objectives: [mlm]
    optimizer: {lr: 1e-3}
"""


def start(folder: str, stage: str | None) -> dict[str, Any]:
    """Worker: a run, and what it says about its layouts."""
    read = parse_plan(PLAN, world_size=2)
    run = Path(folder)
    assert train(read, RunOptions(run, Start(stage=stage)), torch.device("cpu")) == 0
    earlier = parse_plan((run / "plan.yaml").read_text(), world_size=2)
    again, notes = with_layouts(read, earlier, torch.device("cpu"))
    return {
        "layouts": [vars(one.parallel) for one in earlier.stages],
        "kept": [vars(one.parallel) for one in again.stages] == [vars(one.parallel) for one in earlier.stages],
        "samples": [one.samples_per_step(2) for one in earlier.stages],
        "notes": notes,
    }


def test_all_processes_take_one_layout_and_keep_it(run_distributed: Any, tmp_path: Path) -> None:
    run = tmp_path / "auto"
    first, second = run_distributed(start, processes=2, folder=str(run), stage="spatial")
    assert first == second
    assert [one["host"] for one in first["layouts"]][1:] == ["zero"]
    assert first["layouts"][0]["host"] in ("plain", "zero", "pipeline")
    assert first["layouts"][1]["zero_stage"] == 2
    assert first["samples"] == [16, 16]
    assert first["kept"]
    assert first["notes"] == ["stage spatial: parallel: auto takes what the run began with"]
    logs = [path.read_text() for path in tmp_path.glob("run0/*.log")]
    assert any("stage spatial: parallel: auto takes" in log and "s a step" in log for log in logs)
    (whole, _) = run_distributed(start, processes=2, folder=str(run), stage=None)
    assert whole["layouts"] == first["layouts"]
    assert (run / "stages" / "02-temporal" / "weights.safetensors").is_file()
