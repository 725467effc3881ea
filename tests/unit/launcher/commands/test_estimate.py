"""``omnivl estimate`` from the command line."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from engine.estimate.hardware import load_hardware
from engine.estimate.report import outlined
from engine.estimate.work import model_work
from engine.plan.parse import load_plan
from launcher.cli import app
from omnivl.data.sources import open_source
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
    assert data["decoding_share"] == pytest.approx(stage["samples_per_second"] / 2 / (128 * 230))
    failures = stage["failures"]
    assert failures["stretch"] > 1.01 and 0 < failures["goodput"] < 1
    assert [run["interval"] / failures["daly_interval"] for run in failures["intervals"]] == [0.25, 0.5, 1, 2, 4]


def test_tables_and_a_search() -> None:
    pipeline = ["parallel.host=pipeline", "parallel.zero_stage=1", "stages.spatial.batch.gradient_accumulation_steps=4"]
    arguments = ["estimate", *SMALL, *pipeline, "--gpus-per-node", "4", "--search", "--micro-batches", "1"]
    told = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    for part in ("pipeline of 2, ZeRO-1, 4 x 4", "bubble", "pipeline boundary", "layouts fit", "MFU", "activations"):
        assert part in told, part


TWO_STAGES = """
name: two
model: {preset: tiny, vision_layers: 2, text_layers: 1, alignment_layers: 1, generation_layers: 1}
parallel: {host: plain}
batch: {micro_batch_size_per_gpu: 4}
stages:
  - name: one
    steps: 4600
    data:
      - {source: emoji, kind: image_text, weight: 3, where: {style: [fluent, noto]}}
      - {source: nowhere/*.tar, kind: image_text}
    objectives: [univlc]
  - {name: two, steps: 100, init_from: one, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""


def test_the_whole_training_and_its_price(tmp_path: Path) -> None:
    """4,600 steps of 8 x 4 samples, three quarters of them drawings of two styles, which are counted; stages add up."""
    file = tmp_path / "plan.yaml"
    file.write_text(TWO_STAGES)
    arguments = ["estimate", str(file), "--gpus-per-node", "8", "--price-per-gpu-hour", "2.5", "--hardware", "a100"]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    for name, steps in (("one", 4600), ("two", 100)):
        found, training = told["stages"][name], told["stages"][name]["training"]
        assert training["samples"] == steps * 32
        assert training["hours"] == pytest.approx(steps * found["seconds"] / 3600)
        assert training["gpu_hours"] == pytest.approx(8 * training["hours"])
        assert training["cost"] == pytest.approx(2.5 * training["gpu_hours"])
    entry, other = load_plan(file).stages[0].data
    epochs = 4600 * 32 * 0.75 / len(open_source(entry, seed=0))
    first = told["stages"]["one"]["training"]["epochs"]
    assert first == {"one": {entry.key: pytest.approx(epochs), other.key: None}}
    assert told["training"]["samples"] == 4700 * 32
    assert told["training"]["cost"] == pytest.approx(sum(one["training"]["cost"] for one in told["stages"].values()))
    shown = CliRunner().invoke(app, [*arguments, "--samples", "32000"], catch_exceptions=False).stdout
    assert "GPU-hours" in shown and "cost" in shown and "All steps of one and two" in shown
    assert re.search(r"epochs of one, image_text:emoji +3.45", shown), "4,600 x 32 x 3 / 4 / 32,000"
    assert "cannot be counted here (--samples)" in shown


def test_a_loader_that_gives_too_little_slows_the_step() -> None:
    """100 images a second on each of two nodes: 32 samples take 0.16 s, whatever the devices could do."""
    common = ["estimate", *SMALL, "--nodes", "2", "--gpus-per-node", "4"]
    slow = [*common, "--images-per-second", "100"]
    fast = json.loads(CliRunner().invoke(app, [*common, "--json"], catch_exceptions=False).stdout)["stages"]["spatial"]
    told = json.loads(CliRunner().invoke(app, [*slow, "--json"], catch_exceptions=False).stdout)["stages"]["spatial"]
    assert fast["seconds"] == fast["seconds_without_loader"] < 0.1
    assert told["seconds"] == pytest.approx(32 / 2 / 100)
    assert told["seconds_without_loader"] == fast["seconds"]
    assert told["seconds_by_cause"]["the loader"] == pytest.approx(0.16 - fast["seconds"])
    assert told["samples_per_second"] == pytest.approx(200)
    assert told["data"]["decoding_share"] == pytest.approx(1)
    assert told["training"]["hours"] / fast["training"]["hours"] == pytest.approx(0.16 / fast["seconds"])
    shown = CliRunner().invoke(app, slow, catch_exceptions=False).stdout
    assert "the loader: decoding gives 200 samples a second" in " ".join(shown.split())
    storage = [*common, "--image-kb", "1e6", "--json"]  # 16 GB a node and step
    read = json.loads(CliRunner().invoke(app, storage, catch_exceptions=False).stdout)["stages"]["spatial"]
    rate = load_hardware("a100").storage_gigabytes_per_second
    assert read["seconds"] == pytest.approx(16 / rate)


@pytest.mark.parametrize(
    "given", [(), ("stages.spatial.batch.global_batch_size=16", "parallel.zero_stage=2"), ("parallel=auto",)]
)
def test_the_overrides_of_a_search_can_be_pasted(given: tuple[str, ...]) -> None:
    """What is printed, split as a shell does, gives a plan with the layout: every one that was found."""
    more = ["stages.spatial.batch.gradient_accumulation_steps=1", *given, "--gpus-per-node", "4"]
    arguments = ["estimate", *SMALL, *more, "--search", "--micro-batches", "2"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    lines = re.findall(r"^overrides of (\d+): (.*)$", shown, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 3
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    ranked = found["stages"]["spatial"]["search"]["ranked"]
    seen = set()
    for (_, line), layout in zip(lines, ranked, strict=False):
        stage = load_plan(PLAN, shlex.split(line), 4).stage("spatial")
        assert stage.samples_per_step(4) == 16
        seen.add((stage.parallel, stage.batch, stage.model))
        if len(seen) > 2:
            continue
        again = ["estimate", PLAN, *shlex.split(line), "--stage", "spatial", "--hardware", "a100"]
        told = json.loads(
            CliRunner().invoke(app, [*again, "--gpus-per-node", "4", "--json"], catch_exceptions=False).stdout
        )
        assert told["stages"]["spatial"]["layout"] == layout["layout"]
        # A search counts rows as joined over all processes; a pipeline joins fewer.
        close = 1e-3 if stage.parallel.host == "pipeline" else 1e-6
        assert told["stages"]["spatial"]["seconds"] == pytest.approx(layout["seconds"], rel=close)
    assert len(seen) == len(lines)


def test_an_open_layout_is_counted_and_outlined_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also with loads of experts, for which an outline is made before."""
    calls: Counter[str] = Counter()

    def watched(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **more: object) -> object:
            calls[name] += 1
            return function(*given, **more)

        return call

    for module in ("counts", "report"):
        for name, function in (("model_work", model_work), ("outlined", outlined)):
            monkeypatch.setattr(f"engine.estimate.{module}.{name}", watched(name, function))
    plan = str(Path(PLAN).with_name("limoe_tiny.yaml"))
    table = tmp_path / "routing.parquet"
    layers = [f"unified_{number:02}" for number in (1, 3, 5)]
    pd.DataFrame({"layer": layers, "expert": [0, 1, 2], "served": True}).to_parquet(table)
    arguments = ["estimate", plan, "parallel=auto", "--gpus-per-node", "1", "--routing", str(table), "--json"]
    told = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert len(told["stages"]) == 1
    # As many as there are micro-batches to choose from.
    assert calls["model_work"] == calls["outlined"] <= 4


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="--stage: got 'first'; allowed are spatial, temporal, joint; name one of them"):
        CliRunner().invoke(app, ["estimate", PLAN, "--stage", "first"], catch_exceptions=False)
    arguments = ["estimate", *SMALL, "parallel.host=zero", "parallel.expert_parallel_size=2", "--gpus-per-node", "3"]
    with pytest.raises(UserError, match=r"expert_parallel_size: got 2"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
