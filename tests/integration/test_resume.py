"""A run that is killed and started again ends with exactly the bits of an uninterrupted run."""

import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patience
import pytest
import torch
from safetensors.torch import load_file

from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(300)]

LAYOUTS = {
    "plain": ("parallel.host=plain", "launch.processes=1"),
    "zero3": ("parallel.host=zero", "parallel.zero_stage=3", "launch.processes=2"),
}


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_run_equals_uninterrupted_run(pretraining: "Pretraining", layout: str, optimizer: str) -> None:
    arguments = (*LAYOUTS[layout], f"stages.spatial.optimizer.kind={optimizer}", "logging.every=1")
    pretraining.run("whole", *arguments)
    seed = int.from_bytes(os.urandom(2), "little")
    kill_after = random.Random(seed).randint(1, 8)  # lines of metrics, so steps
    metrics = pretraining.stage("killed") / "metrics.jsonl"
    killed = pretraining.run_until(
        "killed", lambda: len(read_metrics(metrics)) >= kill_after, signal.SIGKILL, *arguments
    )
    patience.communicate(killed, 60)
    assert not (pretraining.stage("killed") / "complete.json").exists(), "killed too late to test anything"
    pretraining.run("killed", *arguments)

    context = f"seed {seed}: killed after {kill_after} steps"
    whole, resumed = (pretraining.final_state(pretraining.stage(name)) for name in ("whole", "killed"))
    assert not pretraining.differences(whole, resumed), context
    assert_all_is_compared(whole)


def assert_all_is_compared(state: dict[str, Any]) -> None:
    names = state["weights"]
    assert any("momentum_" in name for name in names), "the momentum twins are part of what is compared"
    assert names["losses.heads.univlc.queue.valid"].all(), "the queue is part of what is compared, and is in use"
    assert state["metrics"][-1]["step"] == 10


def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_save_before(
    pretraining: "Pretraining", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs at the second checkpoint; training goes on until the process is killed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if 'RANK' in os.environ:\n"
        "    from engine.hosts import shards\n"
        "    write = shards.write_ranges\n"
        "    shards.write_ranges = lambda path, *what: time.sleep(600) if 'step-000006' in str(path) "
        "else write(path, *what)\n"
    )
    pretraining.run("whole", "logging.every=1")
    metrics = pretraining.stage("killed") / "metrics.jsonl"
    with monkeypatch.context() as slow:
        slow.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        killed = pretraining.run_until(
            "killed", lambda: len(read_metrics(metrics)) >= 8, signal.SIGKILL, "logging.every=1"
        )
        patience.communicate(killed, 60)
    checkpoints = pretraining.stage("killed") / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000003", "step-000006.tmp"]
    assert "going on after step 3" in pretraining.run("killed", "logging.every=1")
    whole, resumed = (pretraining.final_state(pretraining.stage(name)) for name in ("whole", "killed"))
    assert not pretraining.differences(whole, resumed)
    assert_all_is_compared(whole)
    lines = read_metrics(pretraining.stage("whole") / "metrics.jsonl")
    lost = {line["step"]: line["speed"]["save_seconds"] for line in lines}
    assert lost[3] < lost[4], "the snapshot after step 3 is in the line of step 4"


def test_stopped_run_equals_uninterrupted_run(pretraining: "Pretraining") -> None:
    """SIGTERM saves at once, at a step that no plan asked for, and between two lines of metrics.

    It goes to data workers too, as a cluster's does.
    """
    arguments = ("stages.spatial.steps=12", "checkpoint.every=100", "logging.every=5", "loader.num_workers=1")
    pretraining.run("whole", *arguments)
    metrics = pretraining.stage("stopped") / "metrics.jsonl"
    stopped = pretraining.run_until("stopped", lambda: len(read_metrics(metrics)) >= 1, signal.SIGTERM, *arguments)
    output, _ = patience.communicate(stopped, 60)
    assert stopped.returncode == 128 + signal.SIGTERM, output
    assert "stopped after a checkpoint; the same command goes on from there" in output
    (checkpoint,) = (pretraining.stage("stopped") / "checkpoints").glob("step-*")
    assert 5 <= int(checkpoint.name.removeprefix("step-")) < 12
    assert "going on after step" in pretraining.run("stopped", *arguments)

    assert not pretraining.differences(
        pretraining.final_state(pretraining.stage("whole")), pretraining.final_state(pretraining.stage("stopped"))
    )


@pytest.mark.full
def test_torn_checkpoint_is_passed_over(pretraining: "Pretraining") -> None:
    arguments = ("stages.spatial.steps=7",)
    pretraining.run("run", *arguments)
    stage = pretraining.stage("run")
    before = pretraining.final_state(stage)
    (stage / "complete.json").unlink()
    newest = stage / "checkpoints" / "step-000007" / "host" / "shard-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.unlink()  # what was read of it above is mapped from the file
    newest.write_bytes(content)
    output = pretraining.run("run", *arguments)
    assert (
        "step-000007 is passed over: host/shard-00000.safetensors does not have the SHA-256 that the manifest" in output
    )
    assert "going on after step 6" in output
    assert not pretraining.differences(before, pretraining.final_state(stage))


@pytest.mark.full
def test_a_run_goes_on_with_another_layout(pretraining: "Pretraining") -> None:
    """Two processes with experts cut over them, then one without DeepSpeed, then two again."""
    arguments = (
        *("model.dropout=0", "model.drop_path=0", "logging.every=1", "model.ffn.kind=limoe", "model.ffn.num_experts=4"),
        *("model.ffn.noise=0", "model.ffn.losses.load=0", "stages.spatial.optimizer.schedule=constant"),
        "stages.spatial.optimizer.eps=1e-3",  # so large that rounding noise is not blown up to a full step
    )
    alone = ("parallel.host=plain", "launch.processes=1", "batch.micro_batch_size_per_gpu=4")
    two = ("parallel.host=zero", "launch.processes=2", "batch.micro_batch_size_per_gpu=2")
    cut = (*two, "parallel.zero_stage=3", "parallel.expert_parallel_size=2")
    pretraining.run("whole", *arguments, *alone)
    pretraining.run("moved", *arguments, *cut, "stages.spatial.steps=4")
    output = pretraining.run("moved", *arguments, *alone, "stages.spatial.steps=7")
    assert (
        "step-000004 was written by zero-3 on 2 processes, experts split over 2, 8 samples a step; "
        "going on with plain on 1 process, 8 samples a step"
    ) in output
    output = pretraining.run("moved", *arguments, *two, "parallel.zero_stage=1")
    assert "step-000007 was written by plain on 1 process" in output
    whole, moved = (read_metrics(pretraining.stage(name) / "metrics.jsonl") for name in ("whole", "moved"))
    losses = [[line["losses"] for line in lines if line["event"] == "train"] for lines in (whole, moved)]
    assert len(losses[0]) == len(losses[1]) == 10
    for step, (ours, theirs) in enumerate(zip(*losses, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4), f"step {step + 1}"
    ours, theirs = (load_file(pretraining.stage(name) / "weights.safetensors") for name in ("moved", "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def change_layouts(pretraining: "Pretraining", steps: int, first: int, second: int) -> tuple[list[Any], list[Any]]:
    """Runs a plan on one process, and again: ZeRO-3 on two up to a step, a pipeline 2 x 2 up to another, then one.

    Returns:
        The metrics of both runs.
    """
    arguments = (
        *("model.dropout=0", "model.drop_path=0", "logging.every=1", "stages.spatial.optimizer.schedule=constant"),
        *("stages.spatial.optimizer.eps=1e-3", "stages.spatial.evaluate.every=5"),
        "stages.spatial.evaluate.tasks=[{kind: retrieval, where: {split: [test], style: [twemoji]}, max_samples: 40}]",
    )
    alone = ("parallel.host=plain", "launch.processes=1", "batch.micro_batch_size_per_gpu=4", f"stages.0.steps={steps}")
    zero = ("parallel.host=zero", "parallel.zero_stage=3", "launch.processes=2", "batch.micro_batch_size_per_gpu=2")
    grid = ("parallel.host=pipeline", "parallel.pipeline_stages=2", "batch.micro_batch_size_per_gpu=2")
    pretraining.run("whole", *arguments, *alone)
    pretraining.run("moved", *arguments, *zero, f"stages.0.steps={first}")
    cut = (*grid, "parallel.zero_stage=1", "launch.processes=4", f"stages.0.steps={second}")
    output = pretraining.run("moved", *arguments, *cut, limit=240)
    assert "going on with pipeline-1 on 4 processes, 2 pipeline stages, 8 samples a step" in output
    pretraining.run("moved", *arguments, *alone)
    whole, moved = (read_metrics(pretraining.stage(name) / "metrics.jsonl") for name in ("whole", "moved"))
    return whole, moved


def test_a_run_goes_from_zero_to_a_pipeline_to_one_process(pretraining: "Pretraining") -> None:
    """Its losses, and what it is evaluated at, lie on top of those of a run that was left alone."""
    whole, moved = change_layouts(pretraining, steps=10, first=3, second=7)
    losses = [[line["losses"] for line in lines if line["event"] == "train"] for lines in (whole, moved)]
    assert len(losses[0]) == len(losses[1]) == 10
    for step, (ours, theirs) in enumerate(zip(*losses, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4), f"step {step + 1}"
    scores = [
        {line["step"]: line["scores"] for line in lines if line["event"] == "evaluation"} for lines in (whole, moved)
    ]
    assert scores[0].keys() <= scores[1].keys()  # every stretch ends with an evaluation of its own
    for step, expected in scores[0].items():
        assert scores[1][step] == pytest.approx(expected, abs=0.03), f"step {step}"
    ours, theirs = (load_file(pretraining.stage(name) / "weights.safetensors") for name in ("moved", "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
