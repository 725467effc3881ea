"""``omnivl estimate`` from the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from omnivl.errors import UserError

PLAN = str(Path(__file__).parents[4] / "configs" / "plans" / "emoji.yaml")
FEW = ["model.vision_layers=2", "model.text_layers=1", "model.alignment_layers=1", "model.generation_layers=1"]
SMALL = [PLAN, "stages.spatial.batch.micro_batch_size_per_gpu=4", *FEW, "--stage", "spatial", "--hardware", "a100"]


def test_everything_as_json() -> None:
    arguments = ["estimate", *SMALL, "--nodes", "2", "--gpus-per-node", "4", "--failures", "--jitter", "0.05", "--json"]
    told = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert told["processes"] == 8 and list(told["stages"]) == ["spatial"]
    stage = told["stages"]["spatial"]
    assert stage["samples_per_step"] == 32
    assert stage["flops_per_step"] == pytest.approx(32 * stage["flops_per_sample"])
    assert stage["mfu"] == pytest.approx(stage["flops_per_step"] / (stage["seconds"] * 8 * 312e12))
    assert sum(stage["parameters"]["parts"].values()) == stage["parameters"]["trained"]
    trained = stage["parameters"]["trained"]
    sent = stage["traffic"]["gradient reduction"]
    assert sent["within_node"] + sent["between_nodes"] == pytest.approx(2 * 7 / 8 * 4 * trained)
    data = stage["data"]
    assert data["bytes_per_second"] == pytest.approx(stage["samples_per_second"] * 100e3)
    assert data["decoding_share"] == pytest.approx(stage["samples_per_second"] / 2 / 12000)
    failures = stage["failures"]
    assert failures["stretch"] > 1.01 and 0 < failures["goodput"] < 1
    assert [run["interval"] / failures["daly_interval"] for run in failures["intervals"]] == [0.25, 0.5, 1, 2, 4]


def test_tables_and_a_search() -> None:
    pipeline = ["parallel.host=pipeline", "parallel.zero_stage=1", "stages.spatial.batch.gradient_accumulation_steps=4"]
    arguments = ["estimate", *SMALL, *pipeline, "--gpus-per-node", "4", "--search", "--micro-batches", "1"]
    told = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    for part in ("pipeline of 2, ZeRO-1, 4 x 4", "bubble", "pipeline boundary", "layouts fit", "MFU", "activations"):
        assert part in told, part


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="--stage: got 'first'; allowed are spatial, temporal, joint; name one of them"):
        CliRunner().invoke(app, ["estimate", PLAN, "--stage", "first"], catch_exceptions=False)
    arguments = ["estimate", *SMALL, "parallel.host=zero", "parallel.expert_parallel_size=2", "--gpus-per-node", "3"]
    with pytest.raises(UserError, match=r"expert_parallel_size: got 2"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
