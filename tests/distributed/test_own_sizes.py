"""A whole run on pictures and clips of their own sizes: training, evaluation and resumption, on every kind of host."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from media_files import clip
from tar_files import write_tar

from engine.plan.parse import parse_plan
from engine.run.earlier import Start
from engine.run.entrance import RunOptions
from engine.run.train import train

pytestmark = pytest.mark.distributed

WORDS = ("red", "heart", "cat", "face", "sun", "tree", "blue", "dog")
PLAN = """
name: own
seed: 3
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 2, text_layers: 2, alignment_layers: 1,
  generation_layers: 1, projection_size: 8, image_size: 64, video_size: 32, patch_size: 8, num_frames: 2,
  sizes: native, drop_path: 0.1}
parallel: {host: zero, zero_stage: 3}
launch: {processes: 2}
batch: {micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}
loader: {num_workers: 0}
logging: {every: 1, tensorboard: true}
checkpoint: {every: 2}
stages:
  - name: spatial
    steps: 3
    data: [{source: SHARD, kind: image_text, where: {split: [train]}}]
    objectives: [vlm, mlm, lm, mrm, {kind: univlc, queue_size: 8}]
    optimizer: {lr: 1e-3}
    evaluate:
      every: 3
      tasks:
        - {kind: retrieval, name: pairs, source: SHARD, where: {split: [val]}, max_samples: 7, matcher: vlm}
        - {kind: caption, name: written, source: SHARD, where: {split: [val]}, max_samples: 5}
  - name: temporal
    init_from: spatial
    steps: 2
    parallel: {host: HOST}
    data: [{source: SHARD, kind: video_text}]
    objectives: [mlm, mfm, {kind: univlc, queue_size: 0}]
    optimizer: {lr: 1e-3}
"""
HOSTS = {"pipeline": "pipeline, pipeline_stages: 2, zero_stage: 1", "zero1": "zero, zero_stage: 1"}


def shard(folder: Path) -> str:
    """Pictures and clips from 8 to 200 pixels a side."""
    random, members = np.random.default_rng(0), []
    for number in range(40):
        height, width = np.clip(np.exp(random.normal(4, 0.6, 2)), 8, 200).astype(int).tolist()
        picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        text = {"caption": f"a {WORDS[number % 8]} {WORDS[number % 5]}", "split": "train" if number < 30 else "val"}
        members += [(f"p{number:02d}.jpg", cv2.imencode(".jpg", picture)[1].tobytes())]
        members += [(f"p{number:02d}.json", json.dumps(text).encode())]
    for number, sides in enumerate([(16, 16), (64, 32), (32, 96), (48, 48)] * 2):
        members += [(f"v{number}.mp4", clip(sides=sides))]
        members += [(f"v{number}.json", json.dumps({"caption": f"clip {WORDS[number]}"}).encode())]
    return str(write_tar(folder / "own.tar", members))


def run_stages(folder: str, plan: str) -> dict[str, Any]:
    """Worker: a run, stopped after its first stage and resumed."""
    read = parse_plan(plan, world_size=2)
    for stage in ("spatial", None):
        assert train(read, RunOptions(Path(folder), Start(stage=stage)), torch.device("cpu")) == 0
    return {"done": True}


@pytest.mark.parametrize("host", HOSTS)
def test_a_run_on_pictures_of_their_own_sizes(run_distributed: Any, tmp_path: Path, host: str) -> None:
    plan = PLAN.replace("SHARD", shard(tmp_path)).replace("HOST", HOSTS[host])
    run = tmp_path / "run"
    assert run_distributed(run_stages, processes=2, limit=150, folder=str(run), plan=plan) == [{"done": True}] * 2
    stages = run / "stages"
    scores = json.loads((stages / "01-spatial" / "evaluation.json").read_text())
    found = [score for one in scores["results"] for score in one["scores"]]
    assert {(score["task"], score["count"]) for score in found} == {("pairs", 7), ("written", 5)}
    shares, ranks = ([score for score in found if score["graded"] is graded] for graded in (True, False))
    assert all(0 <= score["value"] <= 1 for score in shares), "finite, as nan is in no range"
    assert all(score["metric"].endswith("median rank") and 1 <= score["value"] <= 7 for score in ranks)
    recalls = {score["metric"]: score["value"] for score in found if score["task"] == "pairs"}
    for way in ("image->text", "text->image"):
        assert recalls[f"{way} R@1"] <= recalls[f"{way} R@5"] <= recalls[f"{way} R@10"] == 1, "of 7"
    for stage in ("01-spatial", "02-temporal"):
        assert (stages / stage / "weights.safetensors").is_file()
