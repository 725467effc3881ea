"""An evaluation that fails costs a run no step: what was trained is saved first, and the run goes on without it."""

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patience
import pytest
from metric_lines import comparable_lines
from PIL import Image
from safetensors.torch import load_file
from tar_files import write_tar

from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

PLAN = """
name: unevaluated
seed: 5
model: {preset: MODEL, dropout: 0.1}
launch: {processes: 2}
batch: {micro_batch_size_per_gpu: 4}
logging: {every: 1, tensorboard: false}
checkpoint: {every: 100, keep_last: 1}
stages:
  - name: first
    steps: 4
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [univlc]
    evaluate: {every: EVERY, tasks: [{kind: retrieval, source: SHARD, max_samples: 8}]}
  - name: second
    init_from: first
    steps: 2
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [univlc]
"""


def marker_of(stage: Path) -> dict[str, Any]:
    """What the stage's marker says, but for the hash of its weights."""
    marker = json.loads((stage / "complete.json").read_text())
    assert len(marker.pop("weights")) == 64
    return marker


def write_shard(path: Path, broken: int | None) -> None:
    """Eight pictures with texts; one of them may be cut in the middle, behind its header."""
    members = {}
    for number in range(8):
        picture = io.BytesIO()
        colour = (30 * number, 255 - 30 * number, 90)
        Image.new("RGB", (64, 64), colour).save(picture, "PNG")
        content = picture.getvalue()
        if number == broken:
            content = content[: len(content) // 2]
        members |= {f"{number}.png": content, f"{number}.txt": f"colour {number}".encode()}
    write_tar(path, members)


ALONE = ("launch.processes=1", "parallel.host=plain")


@pytest.fixture
def shard(pretraining: "Pretraining") -> Path:
    path = pretraining.folder / "shard-000000.tar"
    write_plan(pretraining, path, every=0)
    return path


@pytest.fixture(scope="module")
def intact(shared_pretraining: "Pretraining") -> Path:
    """The first stage of a run on one process whose only evaluation, the last one, succeeded."""
    shard = shared_pretraining.folder / "shard-000000.tar"
    write_shard(shard, None)
    write_plan(shared_pretraining, shard, every=0)
    assert "evaluating" in shared_pretraining.run("intact", *ALONE)
    return shared_pretraining.stage("intact", "01-first")


def write_plan(pretraining: "Pretraining", shard: Path, *, every: int) -> None:
    pretraining.write_plan(PLAN.replace("SHARD", str(shard)).replace("EVERY", str(every)))


# The first and the last sample belong to different processes: only one of them fails, the other must not wait for it.
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("broken", "host"),
    [*(pytest.param(broken, "plain", marks=pytest.mark.full) for broken in (0, 7)), (7, "zero")],
)
def test_a_failed_last_evaluation_leaves_the_stage_complete(
    pretraining: "Pretraining", shard: Path, broken: int, host: str
) -> None:
    write_shard(shard, broken)
    output = pretraining.run("run", f"parallel.host={host}")
    stage = pretraining.stage("run", "01-first")
    assert "stage first: complete, but not evaluated" in output
    assert f"{broken}" in json.loads((stage / "unevaluated.json").read_text())["4"]
    assert "omnivl evaluate" in output
    assert "Traceback" not in output
    assert marker_of(stage) == {"steps": 4}
    assert not (stage / "evaluation.json").exists()
    assert load_file(pretraining.stage("run", "02-second") / "weights.safetensors")
    assert [line["step"] for line in read_metrics(stage / "metrics.jsonl")] == [1, 2, 3, 4]
    # the same command finds nothing left to do, and still says what is missing
    again = pretraining.run("run", f"parallel.host={host}")
    assert "stage first: complete, but not evaluated" in again

    write_shard(shard, None)
    command = [sys.executable, "-m", "launcher.cli", "evaluate", str(pretraining.folder / "run"), "--stage", "first"]
    done = patience.run(command, capture_output=True, text=True, limit=300, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((pretraining.folder / "run" / "evaluation-first.json").read_text())
    assert (written["stage"], written["step"]) == ("first", 4)


def test_an_evaluation_that_is_killed_is_repeated_and_no_step_is(
    pretraining: "Pretraining", shard: Path, intact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(shard, None)
    fault = {
        **{"moment": "evaluation", "stage": "first", "step": 4, "victim": 0, "action": "kill"},
        **{"run": str(pretraining.folder / "run"), "record": str(pretraining.folder / "struck.json")},
    }
    with monkeypatch.context() as patch:
        patch.setenv("OMNIVL_TEST_FAULT", json.dumps(fault))
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'faults'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        pretraining.run("run", *ALONE, code=137)
    stage = pretraining.stage("run", "01-first")
    assert marker_of(stage) == {"steps": 4, "evaluation_due": True}
    assert load_file(stage / "weights.safetensors").keys() == load_file(intact / "weights.safetensors").keys()
    before = (stage / "weights.safetensors").read_bytes()
    output = pretraining.run("run", *ALONE)
    assert "evaluating" in output
    assert "stage 1/2 first  step" not in output.replace("step 4/4", "")
    assert marker_of(stage) == {"steps": 4}
    assert (stage / "weights.safetensors").read_bytes() == before
    assert comparable_lines(stage / "metrics.jsonl") == comparable_lines(intact / "metrics.jsonl")


def test_a_failed_evaluation_within_a_stage_costs_no_step_either(
    pretraining: "Pretraining", shard: Path, intact: Path
) -> None:
    """The stage is built anew, goes on from its checkpoint, and ends with the bits of a run without that evaluation."""
    write_plan(pretraining, shard, every=2)
    write_shard(shard, 3)
    output = pretraining.run("run", *ALONE, "checkpoint.every=2")
    assert "step 2: the evaluation failed" in output
    stage = pretraining.stage("run", "01-first")
    assert json.loads((stage / "unevaluated.json").read_text()).keys() == {"2", "4"}
    assert (stage / "weights.safetensors").read_bytes() == (intact / "weights.safetensors").read_bytes()
    lines = [line for line in comparable_lines(intact / "metrics.jsonl") if line["event"] == "train"]
    assert comparable_lines(stage / "metrics.jsonl") == lines


def test_a_curve_that_fails_costs_no_step_and_is_not_tried_again(pretraining: "Pretraining", shard: Path) -> None:
    """A picture is cut in the middle: the look at the plan does not decode it, the evaluation before step 1 does."""
    write_shard(shard, 7)
    curve = f"stages.first.evaluate={{curve: {{tasks: [{{kind: retrieval, source: {shard}, max_samples: 8}}]}}}}"
    output = pretraining.run("run", *ALONE, curve)
    stage = pretraining.stage("run", "01-first")
    assert "stage first: no curve any more, as its evaluation failed at step 0: " in output
    assert f"remove {stage / 'curve_failed.json'} to have it again" in output
    assert "7" in json.loads((stage / "curve_failed.json").read_text())["0"]
    assert marker_of(stage) == {"steps": 4}
    assert [line["step"] for line in read_metrics(stage / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_metrics(stage / "curve.jsonl") == []
    assert not (stage / "unevaluated.json").exists()
