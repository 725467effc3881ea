"""A stage that trains low-rank adapters: what it hands on, what its checkpoints hold, and its resumption."""

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from engine.disk.saved import saved_weights
from engine.disk.trained import find_trained, load_encoder

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
"""
ADAPTED = ("attention.qkv", "attention.out", "ffn.fc1", "ffn.fc2")


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.host=plain",),
        pytest.param(
            ("parallel.host=zero", "parallel.zero_stage=3", "launch.processes=2"),
            marks=[pytest.mark.distributed, pytest.mark.full],
        ),
    ],
)
def test_a_stage_with_adapters_hands_on_merged_weights_and_resumes_to_the_bit(
    pretraining: "Pretraining", layout: tuple[str, ...]
) -> None:
    pretraining.write_plan(PLAN)
    pretraining.run("run", *layout)
    stage = pretraining.stage("run", "02-tuned")
    whole = pretraining.final_state(stage)
    lines = [line for line in whole["metrics"] if line["event"] == "train"]
    assert lines[0]["lr"].keys() == {"decay", "decay_x2", "no_decay"}

    before = load_file(pretraining.stage("run", "01-before") / "weights.safetensors")
    after = whole["weights"]
    assert not [name for name in after if ".adapter." in name]
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    changed = {name for name in changed if not name.startswith("losses.") and "momentum_" not in name}
    stacks = {"visual_00", "visual_01", "alignment_00"}
    assert {name.partition(".")[0] for name in changed} == stacks, "texts are frozen, pictures write no captions"
    assert {name.partition(".block.")[2] for name in changed} == {f"{one}.weight" for one in ADAPTED}

    checkpoints = sorted((stage / "checkpoints").glob("step-*"))
    held = {name for file in (checkpoints[-1] / "host").glob("*.safetensors") for name in load_file(file)}
    assert any(".momentum_block.attention.qkv.adapter.up" in name for name in held)
    merged = dict(saved_weights(checkpoints[-1]))
    assert merged.keys() == after.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.items()), "the last step is saved"
    words = torch.tensor([[2, 7, 9, 3]])
    encoders = [load_encoder(find_trained(target), torch.device("cpu")) for target in (stage, checkpoints[-1])]
    assert torch.equal(*(encoder.chain.encode_text(words) for encoder in encoders))

    for file in ("complete.json", "weights.safetensors"):
        (stage / file).unlink()
    shutil.rmtree(checkpoints[-1])
    assert "going on after step 6" in pretraining.run("run", *layout)
    assert not pretraining.differences(whole, pretraining.final_state(stage))
