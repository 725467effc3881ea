"""A stage that is trained with Muon after one that was trained with AdamW."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining
    from torch import Tensor

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PLAN = """
name: two
model: {preset: MODEL}
parallel: {host: plain, precision: fp32}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 4}
logging: {every: 1, tensorboard: false}
stages:
  - name: adamw
    steps: 2
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, univlc]
  - name: muon
    init_from: adamw
    steps: 1
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, univlc]
    optimizer: {kind: muon, betas: [0.9, 0.99], gradient_clipping: 0, muon: {momentum: 0.95}}
"""


def held(stage: Path) -> tuple[dict[str, dict[str, "Tensor"]], int]:
    """The tensors of a stage's newest checkpoint by field and name, and the steps of its optimizer."""
    host = max((stage / "checkpoints").glob("step-*")) / "host"
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(host / "shard-00000.safetensors").items():
        field, _, name = key.partition("/")
        fields.setdefault(field, {})[name] = tensor
    return fields, json.loads((host / "index.json").read_text())["steps"]


@pytest.mark.full
def test_a_stage_with_muon_starts_with_the_weights_of_one_with_adamw_and_fresh_moments(
    pretraining: "Pretraining",
) -> None:
    """After one step its moments are of this step's gradient alone."""
    pretraining.write_plan(PLAN)
    output = pretraining.run("run")
    assert "weights from adamw" in output
    first, second = (pretraining.stage("run", name) for name in ("01-adamw", "02-muon"))
    assert held(first)[0]["exp_avg"].keys() == held(first)[0]["exp_avg_sq"].keys()
    fields, steps = held(second)
    assert steps == 1
    by_adamw = fields["exp_avg_sq"].keys()
    by_muon = fields["exp_avg"].keys() - by_adamw
    assert by_adamw < fields["exp_avg"].keys()
    assert {name for name in by_muon if name.endswith("attention.qkv.weight")}
    # exp_avg is (1 - beta) times the gradient, or (1 - momentum) times.
    squares = [(fields["exp_avg"][name] / 0.1).square().sum() for name in by_adamw]
    squares += [(fields["exp_avg"][name] / 0.05).square().sum() for name in by_muon]
    (line,) = read_metrics(second / "metrics.jsonl")
    assert float(sum(squares)) ** 0.5 == pytest.approx(line["gradient_norm"], rel=1e-4)
    # exp_avg_sq is (1 - beta) times the gradient's square.
    for name in by_adamw:
        assert fields["exp_avg_sq"][name].sum().item() == pytest.approx(
            float((fields["exp_avg"][name] / 0.1).square().sum() * 0.01), rel=1e-4, abs=1e-12
        ), name
