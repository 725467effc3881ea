"""A stage that trains low-rank adapters: what it hands on, what its checkpoints hold, and its resumption."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import patience
import pytest
import torch
from safetensors.torch import load_file

from engine.disk.saved import saved_weights
from engine.finished.trained import find_trained, load_encoder
from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PLAN = """
name: lora
seed: 3
model: {preset: MODEL, dropout: 0.1}
parallel: {host: plain, precision: fp32}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 4}
logging: {every: 1, tensorboard: false}
checkpoint: {every: 3, keep_last: 2}
stages:
  - name: before
    steps: 2
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, {kind: univlc, queue_size: 24, batch_keys: momentum}]
    optimizer: {lr: 1e-3}
  - name: tuned
    init_from: before
    steps: 8
    lora: {rank: 2, alpha: 4, dropout: 0.2, on: [attention, feed_forward]}
    freeze: ["text_*"]
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, {kind: univlc, queue_size: 24, batch_keys: momentum}, vlm]
    optimizer: {lr: 1e-2, schedule: constant, lr_scales: {"*.adapter.up": 2}}
    evaluate: {every: 0, tasks: [{kind: retrieval, max_samples: 8}]}
"""
ADAPTED = ("attention.qkv.weight", "attention.out.weight", "temporal_fc.weight", "ffn.fc1.weight", "ffn.fc2.weight")


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.host=plain",),
        pytest.param(
            ("parallel.host=zero", "parallel.zero_stage=3", "launch.processes=2"), marks=pytest.mark.distributed
        ),
    ],
)
def test_a_stage_with_adapters_resumes_to_the_bit_and_hands_on_merged_weights(
    pretraining: "Pretraining", layout: tuple[str, ...]
) -> None:
    pretraining.write_plan(PLAN)
    pretraining.run("whole", *layout)
    metrics = pretraining.stage("killed", "02-tuned") / "metrics.jsonl"
    killed = pretraining.run_until("killed", lambda: len(read_metrics(metrics)) >= 5, signal.SIGKILL, *layout)
    patience.communicate(killed, 60)
    assert not (metrics.parent / "complete.json").exists(), "killed too late to test anything"
    assert "going on after step" in pretraining.run("killed", *layout)
    whole, resumed = (pretraining.final_state(pretraining.stage(name, "02-tuned")) for name in ("whole", "killed"))
    assert not pretraining.differences(whole, resumed)
    lines = [line for line in whole["metrics"] if line["event"] == "train"]
    assert lines[0]["lr"].keys() == {"decay", "decay_x2", "no_decay"}

    stage = pretraining.stage("whole", "02-tuned")
    before = load_file(pretraining.stage("whole", "01-before") / "weights.safetensors")
    after = load_file(stage / "weights.safetensors")
    assert not [name for name in after if ".adapter." in name]
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    changed = {name for name in changed if not name.startswith("losses.")}
    assert changed, "something was learnt"
    assert all(name.startswith(("visual_", "alignment_")) and name.endswith(ADAPTED) for name in changed), changed
    assert {name.split(".")[1] for name in changed} == {"block", "momentum_block"}

    checkpoint = max((stage / "checkpoints").glob("step-*"))
    held = {name for file in (checkpoint / "host").glob("*.safetensors") for name in load_file(file)}
    assert any(".attention.qkv.adapter.up" in name for name in held)
    merged = dict(saved_weights(checkpoint))
    assert merged.keys() == after.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.items()), "the last step is saved"
    same_scores(stage, checkpoint)


def same_scores(stage: Path, checkpoint: Path) -> None:
    """The weights file and the checkpoint load into a chain without adapters, and embed alike."""
    words = torch.tensor([[2, 7, 9, 3]])
    made = [
        load_encoder(find_trained(target), torch.device("cpu")).chain.encode_text(words)
        for target in (stage, checkpoint)
    ]
    assert torch.equal(*made)
