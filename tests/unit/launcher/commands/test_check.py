"""``omnivl check`` and the frame of the command line."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import patience
import pytest
import torch

from engine.plan.parse import load_plan
from engine.step.freeze import freeze_idle
from launcher.cli import COMMANDS
from launcher.commands.check import count_parameters, summarize
from omnivl.architectures.build import build_chain
from omnivl.data.tokenizer import load_tokenizer

PLANS = Path(__file__).parents[4] / "configs" / "plans"

PLAN = """
name: run
tokenizer: {vocabulary}
model: {{preset: tiny, vision_layers: 2, text_layers: 1, alignment_layers: 1, generation_layers: 1}}
batch: {{micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}}
launch: {{processes: 3}}
stages:
  - name: one
    steps: 5
    data: [{{source: emoji, kind: image_text, weight: 3}}, {{source: emoji, kind: image_label, weight: 1}}]
    objectives: [{{kind: univlc, queue_size: 8}}, {{kind: mlm, weight: 0.5}}]
    evaluate: {{tasks: [retrieval]}}
"""


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(vocabulary=tmp_path / "vocab.txt"), encoding="utf-8")
    return path


def omnivl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    return patience.run(command, capture_output=True, text=True, limit=120)


def test_a_right_plan_is_summed_up(plan_path: Path) -> None:
    (stage,) = summarize(load_plan(plan_path))["stages"]
    assert stage["mixture"] == {"image_text:emoji": 0.75, "image_label:emoji": 0.25}
    assert stage["objectives"] == {"univlc": 1.0, "mlm": 0.5}
    assert stage["samples_per_step"] == 4 * 2 * 3
    assert stage["samples"] == 5 * 4 * 2 * 3
    assert stage["host"] == "zero-1"
    assert stage["tasks"] == ["retrieval"]
    assert stage["curve"] == []
    override = "stages.0.evaluate.curve={every_seconds: 30, tasks: [zero_shot]}"
    (stage,) = summarize(load_plan(plan_path, [override]))["stages"]
    assert (stage["curve"], stage["curve_seconds"]) == (["zero_shot"], 30.0)


def test_a_plan_is_summed_up_for_the_processes_that_it_was_read_for(plan_path: Path) -> None:
    batch = ["launch.processes=auto", "batch={global_batch_size: 48, gradient_accumulation_steps: auto}"]
    (stage,) = summarize(load_plan(plan_path, batch, 6), 6)["stages"]
    assert (stage["replicas"], stage["samples_per_step"]) == (6, 48)
    with pytest.raises(AssertionError, match="read for other than 6 processes: 288 samples a step for 48"):
        summarize(load_plan(plan_path, batch), 6)


def test_parameters_are_those_of_the_built_chain(plan_path: Path) -> None:
    (stage,) = load_plan(plan_path).stages
    tokens = load_tokenizer(str(plan_path.parent / "vocab.txt")).special
    chain = build_chain(stage.model, stage.objectives, tokens)
    counts = count_parameters(stage, tokens)
    own = sum(p.numel() for p in chain.parameters() if p.requires_grad)
    assert counts["momentum"] == sum(p.numel() for p in chain.parameters() if not p.requires_grad) > 0
    assert sum(counts.values()) == 2 * own + counts["momentum"], "parts, and trained with frozen, add up to all"
    freeze_idle(chain, stage.layouts())
    assert counts["trained"] == sum(p.numel() for p in chain.parameters() if p.requires_grad)
    assert counts["frozen"] == own - counts["trained"] > 0, "decoders that no objective reads"


def test_what_a_stage_freezes_is_no_part_of_what_it_trains(plan_path: Path) -> None:
    tokens = load_tokenizer(str(plan_path.parent / "vocab.txt")).special
    before, after = (
        count_parameters(load_plan(plan_path, overrides).stages[0], tokens)
        for overrides in ([], ["stages.one.freeze=[visual_00]"])
    )
    (stage,) = load_plan(plan_path).stages
    block = build_chain(stage.model, stage.objectives, tokens).get_submodule("visual_00.block")
    frozen = before["trained"] - after["trained"]
    assert frozen == after["frozen"] - before["frozen"] > 0
    assert frozen <= sum(one.numel() for one in block.parameters())


def test_adapters_are_counted_with_their_stacks(plan_path: Path) -> None:
    tokens = load_tokenizer(str(plan_path.parent / "vocab.txt")).special
    before, after = (
        count_parameters(load_plan(plan_path, ["stages.one.weights.all=hub", *overrides]).stages[0], tokens)
        for overrides in ([], ["stages.one.lora={rank: 2}"])
    )
    # Of each block with its rank of 2: 3 x 2 x (192 + 192) of queries, keys and values, and a third of that.
    added = {"visual": 2 * 8 * 384, "text": 8 * 384, "alignment": 8 * 384, "generation": 0}
    assert {name: after[name] - before[name] for name in added} == added
    heads = after["losses"]
    assert after["trained"] == sum(added.values()) + heads
    assert after["frozen"] == sum(before[name] for name in ("trained", "frozen")) - heads
    assert after["momentum"] == before["momentum"] + added["visual"] + added["text"], "the alignment has no twin"


def test_adapters_have_a_line(plan_path: Path) -> None:
    result = omnivl("check", plan_path, "stages.one.weights.all=hub", "stages.one.lora={rank: 2}", "--offline")
    assert result.returncode == 0, result.stderr
    # 12,288 of adapters and 38,984 of the head on words, as counted above.
    assert "rank 2 on attention; with heads 0.05 M parameters are trained" in result.stdout


def test_counting_takes_no_memory_for_the_largest_preset(plan_path: Path) -> None:
    plan = load_plan(plan_path, ["model={preset: giant, vocab_size: 30522}"])
    before = torch.get_rng_state()
    counts = count_parameters(plan.stages[0], load_tokenizer(plan.tokenizer).special)
    assert counts["trained"] > 1e9
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn"


def test_a_right_plan_exits_with_0(plan_path: Path) -> None:
    result = omnivl("check", plan_path, "stages.one.steps=7", "--world-size", "4")
    assert result.returncode == 0, result.stderr
    assert "1. one, from new weights" in result.stdout
    assert "7, 224 samples" in result.stdout


def test_json_is_for_scripts(plan_path: Path) -> None:
    right, wrong = omnivl("check", plan_path, "--json"), omnivl("check", plan_path, "sed=1", "--json")
    summary: dict[str, Any] = json.loads(right.stdout)
    assert (right.returncode, summary["ok"], summary["stages"][0]["steps"]) == (0, True, 5)
    assert wrong.returncode == 2
    (problem,) = json.loads(wrong.stdout)["problems"]
    assert problem.startswith("override 'sed=1': sed: got an unknown key; ")
    assert problem.endswith("; did you mean 'seed'?")


def test_a_wrong_plan_exits_with_2_and_no_traceback(plan_path: Path) -> None:
    result = omnivl("check", plan_path, "stages.one.steps=0", "stages.one.optimizer.lr=x")
    assert result.returncode == 2
    assert sorted(result.stderr.splitlines()) == [
        "override 'stages.one.optimizer.lr=x': stages.0.optimizer.lr: got 'x'; allowed a number; change it to a number",
        "override 'stages.one.steps=0': stages.0.steps: got 0; allowed 1 or more; change the number",
    ]


def test_help_imports_no_command_and_check_no_deepspeed(plan_path: Path) -> None:
    listing = (
        "import sys; from launcher.cli import app; "
        "app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    helped = patience.run([sys.executable, "-c", listing], capture_output=True, text=True, limit=60, check=True)
    assert helped.stdout.splitlines()[-1] == "False"
    for name in COMMANDS:
        assert name in helped.stdout
    checking = (
        "import sys; from launcher.cli import app; "
        f"app(['check', {str(plan_path)!r}], standalone_mode=False); print('deepspeed' in sys.modules)"
    )
    checked = patience.run([sys.executable, "-c", checking], capture_output=True, text=True, limit=60, check=True)
    assert checked.stdout.splitlines()[-1] == "False"


def test_an_unknown_command_is_refused() -> None:
    result = omnivl("chek")
    assert result.returncode == 2
    assert "No such command 'chek'" in result.stderr


def test_it_says_which_losses_get_no_negatives_by_accumulation(plan_path: Path) -> None:
    told = " ".join(omnivl("check", plan_path).stdout.split())
    assert "univlc compares the samples of one micro-batch, at most 12, not those of the whole step" in told
    assert "not those of the whole step (univlc can: batch.contrast: global)" in told
    both = "stages.one.objectives=[lm, {kind: univlc, name: contrast}, vlm]"
    (stage,) = summarize(load_plan(plan_path, [both]))["stages"]
    assert stage["compared_within_a_micro_batch"] == ["contrast", "vlm"]
    assert stage["comparable_across_micro_batches"] == ["contrast"]
    tcl = load_plan(PLANS / "tcl_tiny.yaml", ["batch.gradient_accumulation_steps=2"])
    (stage,) = summarize(tcl)["stages"]
    assert stage["comparable_across_micro_batches"] == ["univlc", "intra_modal"]
    (stage,) = summarize(load_plan(plan_path, [both, "batch.contrast=global"]))["stages"]
    assert stage["compared_within_a_micro_batch"] == ["vlm"], "its negatives are drawn within a micro-batch"
    assert stage["comparable_across_micro_batches"] == []
    (stage,) = summarize(load_plan(plan_path, [both, "batch.gradient_accumulation_steps=1"]))["stages"]
    assert stage["compared_within_a_micro_batch"] == []


def test_the_cut_of_a_pipeline_is_shown(plan_path: Path) -> None:
    overrides = ["parallel.host=pipeline", "parallel.pipeline_stages=3"]
    plan = load_plan(plan_path, overrides, 3)
    (stage,) = summarize(plan, 3)["stages"]
    names = [
        name
        for name, _ in build_chain(plan.stages[0].model, (), load_tokenizer(plan.tokenizer).special).named_children()
    ]
    parts = stage["pipeline"]["stages"]
    places = [[names.index(end) for end in part["layers"]] for part in parts]
    assert places[0][0] == 0
    assert places[-1][1] == len(names) - 1
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(places))
    assert sum(part["cost"] for part in parts) == pytest.approx(1.0)
    assert all(part["activation_bytes"] > 0 for part in parts)
    assert [part["micro_batches_held"] for part in parts] == [2, 2, 1]  # two micro-batches fill three stages
    assert sum(part["parameters"] for part in parts) == sum(
        stage["parameters"][name] for name in ("trained", "frozen", "momentum")
    )
    assert stage["pipeline"]["bubble"] == pytest.approx(2 / 4)  # two stages wait for two micro-batches
    assert stage["samples_per_step"] == 8  # one replica
    shown = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "check", str(plan_path), *overrides], capture_output=True, text=True
    ).stdout
    assert "pipeline of 3 stages, zero-1" in shown
    assert "50% of the time, with 2 micro-batches a step" in shown


def test_layers_on_two_stages_of_a_pipeline_are_shown() -> None:
    overrides = ["parallel.host=pipeline", "parallel.pipeline_stages=2", "batch.gradient_accumulation_steps=4"]
    plan = load_plan(PLANS / "beit3_tiny.yaml", overrides, 2)
    masked, contrast = (stage["pipeline"] for stage in summarize(plan, 2)["stages"])
    first, second = masked["stages"]
    # The second pass begins on the second stage, so that every block of the first stage stands there as well.
    assert first["layers"][0] == "embed" and second["layers"][1] == "losses"
    last = int(first["layers"][1].removeprefix("unified_"))
    assert masked["tied"] == {f"unified_{index:02d}": [1, 2] for index in range(last + 1)}
    whole = sum(summarize(plan, 2)["stages"][0]["parameters"][part] for part in ("trained", "frozen", "momentum"))
    assert first["parameters"] + second["parameters"] - first["copies"] - second["copies"] == whole
    assert first["copies"] > 0 and second["copies"] > 0  # each trains some of them
    assert masked["tied_bytes_per_step"] == 8 * (first["copies"] + second["copies"])
    # Contrast makes no second pass: nobody holds a layer for its sake.
    assert contrast["tied"] == {} and contrast["tied_bytes_per_step"] == 0
    assert all(part["copies"] == 0 for part in contrast["stages"])
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher.cli",
            "check",
            str(PLANS / "beit3_tiny.yaml"),
            *overrides,
            "--world-size",
            "2",
        ],
        **{"capture_output": True, "text": True, "env": {**os.environ, "COLUMNS": "200"}},
    ).stdout
    assert f"unified_00 to unified_{last:02d} on 1 and 2: " in shown
    assert "M of them copies of layers that another stage trains" in shown


def test_the_memory_of_zero_3_is_shown(plan_path: Path) -> None:
    plan = load_plan(plan_path, ["parallel.host=zero", "parallel.zero_stage=3"], 4)
    (stage,) = summarize(plan, 4)["stages"]
    chain = build_chain(plan.stages[0].model, plan.stages[0].objectives, load_tokenizer(plan.tokenizer).special)
    freeze_idle(chain, plan.stages[0].layouts())
    counts = [
        sum(one.numel() for one in chain.parameters() if one.requires_grad == trained) for trained in (True, False)
    ]
    assert min(counts) > 0
    assert stage["memory"]["share"] == (16 * counts[0] + 4 * counts[1]) // 4
    assert stage["memory"]["transient"] >= 4 * 4 * max(
        sum(p.numel() for p in layer.parameters()) for layer in chain.layers
    )
    assert summarize(load_plan(plan_path, ["parallel.zero_stage=2"], 4), 4)["stages"][0]["memory"] is None
    muon = [*(f"parallel.{field}" for field in ("host=zero", "zero_stage=3")), "stages.0.optimizer.kind=muon"]
    shared = summarize(load_plan(plan_path, muon, 4), 4)["stages"][0]["memory"]["share"]
    blocks = [name for name, one in chain.named_layers.items() if one.level is not None and one.level >= 0]
    matrices = sum(
        one.numel()
        for name, one in chain.named_parameters()
        if one.requires_grad and one.dim() > 1 and name.split(".")[0] in blocks
    )
    assert shared == stage["memory"]["share"] - 4 * matrices // 4, "Muon has one moment of a matrix, AdamW two"


def test_a_profile_moves_the_cut(plan_path: Path, tmp_path: Path) -> None:
    overrides = ["parallel.host=pipeline", "parallel.pipeline_stages=2"]
    written = omnivl("profile", str(plan_path), "--repeats", "1", "--out", str(tmp_path / "layers.json"))
    assert written.returncode == 0, written.stderr
    content = json.loads((tmp_path / "layers.json").read_bytes())
    (name,) = content["stages"]
    layers = content["stages"][name]
    assert all(use["seconds"] >= 0 and use["activation_bytes"] >= 0 for use in layers.values())
    assert sum(use["seconds"] for use in layers.values()) > 0
    for layer, use in layers.items():
        use["seconds"] = 100.0 if layer == "losses" else 1.0
    (tmp_path / "layers.json").write_text(json.dumps(content))
    overrides.append(f"parallel.pipeline_profile={tmp_path / 'layers.json'}")
    (stage,) = summarize(load_plan(plan_path, overrides, 2), 2)["stages"]
    assert stage["pipeline"]["by"] == "measured seconds"
    assert stage["pipeline"]["stages"][1]["layers"] == ["losses", "losses"]

    del layers["losses"]
    (tmp_path / "layers.json").write_text(json.dumps(content))
    refused = omnivl("check", str(plan_path), *overrides, "--world-size", "2")
    assert refused.returncode == 2
    assert "is of another chain: it differs in losses; measure again with" in refused.stderr
