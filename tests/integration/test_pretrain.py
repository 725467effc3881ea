"""``omnivl pretrain`` from plan to report, and how it ends when something goes wrong."""

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import patience
import pytest
import yaml
from safetensors.torch import load_file

from engine.disk.weights_file import written_hash
from engine.plan.parse import load_plan
from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

THREE_STAGES = """
name: three
model: {preset: MODEL}
parallel: {host: zero, zero_stage: 3, precision: bf16}
launch: {processes: 2}
batch: {micro_batch_size_per_gpu: 4}
logging: {every: 2}
checkpoint: {every: 2, keep_last: 1, keep_best: unseen style/image->text R@5}
stages:
  - name: spatial
    steps: 4
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, mrm, univlc]
    freeze: ["text_*.attention"]
  - name: temporal
    init_from: spatial
    steps: 2
    data: [{source: motion, kind: video_text}]
    objectives: [mfm, mcm, {kind: univlc, queue_size: 8}]
  - name: joint
    init_from: temporal
    steps: 4
    data:
      - {source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}
      - {source: motion, kind: video_label}
    objectives: [univlc, vlm, lm]
    evaluate:
      every: 2
      tasks:
        - {kind: retrieval, name: unseen style, max_samples: 12, where: {style: [twemoji]}, gallery: 2}
        - {kind: zero_shot, name: motion, source: motion, media: video, max_samples: 9}
        - {kind: caption, name: captions, max_samples: 2}
"""

RECORD = {"step", "event", "loss", "losses", "metrics", "gradient_norm", "lr", "skipped", "speed"}


@pytest.mark.distributed
def test_three_stages_from_plan_to_report(pretraining: "Pretraining") -> None:
    batch = "batch: {micro_batch_size_per_gpu: 16, gradient_accumulation_steps: auto, global_batch_size: 8}"
    pretraining.write_plan(THREE_STAGES.replace("batch: {micro_batch_size_per_gpu: 4}", batch))
    output = pretraining.run("run", limit=200)
    assert "stage spatial: batch 8 = 4 x 1 accumulated x 2" in output
    run = pretraining.folder / "run"
    stages = [pretraining.stage("run", name) for name in ("01-spatial", "02-temporal", "03-joint")]
    for text in (
        "stage 1/3 spatial  step 4/4",
        "weights from temporal",
        "image->text R@5",
        "report: ",
        "try it: omnivl serve ",
    ):
        assert text in output
    assert output.count("stage 1/3 spatial  step 4/4") == 1, "one process prints"
    assert "Traceback" not in output

    for stage, steps in zip(stages, (4, 2, 4), strict=True):
        records = read_metrics(stage / "metrics.jsonl")
        assert [record["step"] for record in records if record["event"] == "train"] == list(range(2, steps + 1, 2))
        complete = {"steps": steps, "weights": written_hash(stage / "weights.safetensors")}
        assert json.loads((stage / "complete.json").read_text()) == complete
        assert list((stage / "tensorboard").glob("events.*"))
        for record in records:
            if record["event"] == "train":
                speed = record["speed"]
                assert set(record) == {
                    *["step", "event", "loss", "losses", "metrics", "gradient_norm", "lr", "skipped", "speed"]
                }
                assert 0 < speed["mfu"] < 1.5
                assert 0 <= speed["data_wait"] <= 1
                assert min(speed["samples_per_second"], speed["tokens_per_second"], speed["memory_gib"]) > 0
    joint = read_metrics(stages[2] / "metrics.jsonl")
    assert [record["step"] for record in joint if record["event"] == "evaluation"] == [2, 4]

    first, second, third = (load_file(stage / "weights.safetensors") for stage in stages)
    handover = json.loads((stages[1] / "handover.json").read_text())
    assert handover["inflated"] == ["embed.block.visual.patches.video_delta"]
    assert all(name.startswith(("losses.", "contrast.")) or "momentum_" in name for name in handover["created"])
    assert {*handover["carried"], *handover["inflated"], *handover["aside"], *handover["dropped"]} == set(first)
    # Heads of the first stage wait in the second one's file, under a name of their own.
    kept = {name: tensor for name, tensor in second.items() if name.startswith("aside.")}
    assert {name.removeprefix("aside.") for name in kept} == set(handover["aside"])
    assert all(tensor.equal(first[name.removeprefix("aside.")]) for name, tensor in kept.items())
    assert not first["visual_00.block.attention.qkv.weight"].equal(second["visual_00.block.attention.qkv.weight"])
    assert any(
        name.startswith("losses.heads.univlc.queue.")
        for name in json.loads((stages[2] / "handover.json").read_text())["dropped"]
    )
    assert not any("momentum_" in name for name in third)

    evaluation = json.loads((stages[2] / "evaluation.json").read_text())
    assert evaluation["step"] == 4
    assert len(evaluation["results"]) == 3
    assert yaml.safe_load((run / "plan.yaml").read_text())["name"] == "three"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2
    assert environment["peak_source"] == "measured"
    assert environment["torch"]
    page = (run / "report.html").read_text()
    assert all(text in page for text in ("spatial", "temporal", "joint", "unseen style", "image-&gt;text R@5"))


def test_same_folder_again(pretraining: "Pretraining") -> None:
    """A finished run is not done again, also where a field is new since; another plan is refused; --fresh starts over;
    --stage needs its source."""
    steps = "stages.spatial.steps=2"
    pretraining.run("run", steps)
    metrics = pretraining.stage("run") / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    plan = pretraining.stage("run").parents[1] / "plan.yaml"  # as a version that did not know of a field would write it
    older = [line for line in plan.read_text().splitlines(keepends=True) if "pipeline_profile" not in line]
    assert len(older) < len(plan.read_text().splitlines())
    plan.write_text("".join(older))
    assert "stage spatial: complete" in pretraining.run("run", steps, "logging.every=1")
    assert metrics.stat().st_mtime_ns == before
    refused = pretraining.run("run", steps, "seed=4", code=2)
    assert "holds a run of another plan:\n  seed: was 3, is now 4\n" in refused
    assert "Traceback" not in refused
    assert "1/1 spatial: 2 steps" in pretraining.run("run", steps, "seed=4", "--fresh")
    unknown = pretraining.run("run", steps, "seed=4", "--stage", "joint", code=2)
    assert "--stage: got 'joint'; allowed are spatial; name one of them" in unknown


def test_run_in_use_is_refused(pretraining: "Pretraining") -> None:
    metrics = pretraining.stage("run") / "metrics.jsonl"
    arguments = ("stages.spatial.steps=5000",)
    first = pretraining.start("run", *arguments)
    while not metrics.exists():
        assert first.poll() is None, first.communicate()[0]
    output = pretraining.run("run", *arguments, code=2)
    assert "another run is writing here: process " in output
    assert output.count("another run is writing here") == 1
    first.send_signal(signal.SIGINT)  # to the launcher alone, as Ctrl-C reaches it
    stopped, _ = patience.communicate(first, 60)
    assert first.returncode == 128 + signal.SIGINT, stopped
    assert "stopped after a checkpoint" in stopped


def test_mistakes_are_told_before_anything_starts(pretraining: "Pretraining") -> None:
    output = pretraining.run("run", "stages.spatial.steps=-1", "stages.spatial.optimizer.lr=fast", code=2)
    assert "stages.0.steps" in output
    assert "stages.0.optimizer.lr" in output
    assert "Traceback" not in output
    assert not (pretraining.folder / "run").exists()


@pytest.mark.distributed
def test_a_rank_that_cannot_write_stops_all_without_a_traceback(
    pretraining: "Pretraining", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines; a folder lies where that of rank 1 writes its part of the checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    from engine.hosts import shards\n"
        "    shards.machine = lambda: os.environ['RANK']\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    checkpoints = pretraining.stage("run") / "checkpoints"
    blocked = checkpoints / "step-000003.tmp" / "host" / "shard-00001.safetensors"
    process = pretraining.start("run", "launch.processes=2", "stages.spatial.steps=5000")
    while process.poll() is None and not (pretraining.stage("run") / "metrics.jsonl").exists():
        pass
    blocked.mkdir(parents=True, exist_ok=True)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == 2, output
    assert "step-000003: could not be written (process 1: [Errno 21] Is a directory" in output
    assert "there is none before it" in output
    assert "Traceback" not in output
    assert list(checkpoints.iterdir()) == []


@pytest.mark.distributed
def test_failing_rank_ends_all_and_is_told_once(
    pretraining: "Pretraining", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 runs into a mistake in the code instead of saving; rank 0 waits for it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import engine.disk.checkpoint_writer\n"
        "    engine.disk.checkpoint_writer.generator_states = lambda: {}['a mistake']\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = pretraining.start("run", "launch.processes=2", "stages.spatial.steps=5000")
    output, _ = patience.communicate(process, 90)
    assert process.returncode == 1, output
    assert output.count("Traceback (most recent call last)") == 1
    assert "rank 1 failed:" in output
    assert "KeyError: 'a mistake'" in output


def test_loss_that_is_not_finite_stops_the_run(pretraining: "Pretraining") -> None:
    output = pretraining.run("run", "stages.spatial.optimizer.lr=100", "guard.max_skipped_steps=3", code=2)
    assert "not finite, step skipped (1 so far)" in output
    assert "steps in a row, which is guard.max_skipped_steps. The weights are those of the last good step." in output
    assert "Traceback" not in output


def test_lost_rank_is_named(pretraining: "Pretraining") -> None:
    lock = pretraining.folder / "run" / "run.lock"
    metrics = pretraining.stage("run") / "metrics.jsonl"
    process = pretraining.start("run", "stages.spatial.steps=5000")
    while not metrics.exists():
        assert process.poll() is None, process.communicate()[0]
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 0 was ended by SIGKILL" in output


def test_precision_is_chosen_once(pretraining: "Pretraining") -> None:
    """The plan in the folder says what was chosen; a run that goes on keeps it, were it the slower one."""
    told = pretraining.run("chosen", "parallel.precision=auto", "stages.spatial.steps=2")
    precision = load_plan(pretraining.folder / "chosen" / "plan.yaml").stage("spatial").parallel.precision
    assert precision in ("bf16", "fp32")
    assert f"parallel.precision: auto takes {precision}" in told
    slower = "fp32" if precision == "bf16" else "bf16"
    kept = pretraining.folder / "chosen" / "plan.yaml"
    before = kept.read_text()
    assert before.count(f"precision: {precision}\n") == 1
    kept.write_text(before.replace(f"precision: {precision}\n", f"precision: {slower}\n"))
    told = pretraining.run("chosen", "parallel.precision=auto", "stages.spatial.steps=4", "--amend")
    assert "going on after step 2" in told and "auto takes" not in told
    assert load_plan(kept).stage("spatial").parallel.precision == slower


def test_nothing_is_left_in_the_temporary_folder(
    pretraining: "Pretraining", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks with a data worker each, whose sockets lie there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # torch's cache, which is to stay
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        pretraining.run("left", "launch.processes=2", "loader.num_workers=1", "stages.spatial.steps=2")
        assert list(Path(temporary).iterdir()) == []


def test_a_temporary_folder_that_is_too_long_for_sockets_is_named(
    pretraining: "Pretraining", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    told = pretraining.run("long", "loader.num_workers=1", "stages.spatial.steps=2", code=2)
    assert "TMPDIR: got a path of " in told and "set TMPDIR to a shorter one, or loader.num_workers to 0" in told
    assert "Traceback" not in told
