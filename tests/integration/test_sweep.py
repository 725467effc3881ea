"""A sweep from its file to its page: finished runs are skipped, failed and missing ones are named."""

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import patience
import pytest
from typer.testing import CliRunner, Result

from engine.disk.run_folder import RunFolder
from engine.watch.failure import read_failure
from launcher.cli import app

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MODEL = Path(__file__).parents[2] / "configs" / "models" / "debug.yaml"
PLAN = f"""
name: tiny
model: {{preset: {MODEL}}}
parallel: {{host: plain, precision: fp32}}
launch: {{processes: 1}}
batch: {{micro_batch_size_per_gpu: 4}}
logging: {{every: 1, tensorboard: false}}
stages:
  - name: contrast
    steps: 3
    data: [{{source: emoji, kind: image_text, where: {{split: [train]}}}}]
    objectives: [{{kind: univlc, queue_size: 0, batch_keys: online}}]
    evaluate: {{tasks: [{{kind: retrieval, where: {{split: [test], style: [twemoji]}}, max_samples: 12}}]}}
"""
SWEEP = """
name: s
plan: plan.yaml
axes:
  ffn: {dense: {}, experts: {model.ffn: {kind: limoe, num_experts: 4, every: 1}}}
  source: {good: {}, bad: {stages.contrast.data.0.where: {style: [nowhere]}}}
exclude: [{ffn: experts, source: bad}]
compare: ffn
"""


def sweep(command: str, folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["sweep", command, str(folder / "s.yaml"), "--folder", str(folder / "runs"), *arguments]
    )


def test_a_sweep_from_its_file_to_its_page(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "s.yaml").write_text(SWEEP)
    assert sweep("run", tmp_path, "--dry-run").output.count(" pretrain ") == 3
    ran = sweep("run", tmp_path, "--parallel", "2")
    assert ran.exit_code == 1
    assert "s: 3 of 3 runs to do" in ran.output
    assert "1 failed: ffn-dense_source-bad;" in ran.output
    metrics = tmp_path / "runs" / "ffn-dense_source-good" / "stages" / "01-contrast" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert "s: 1 of 3 runs to do" in sweep("run", tmp_path).output
    assert metrics.stat().st_mtime_ns == before

    assert sweep("report", tmp_path).exit_code == 0
    rows = pd.read_parquet(tmp_path / "runs" / "sweep.parquet").set_index("run")
    assert dict(rows["state"].value_counts()) == {"complete": 2, "failed": 1}
    assert "nowhere" in rows.loc["ffn-dense_source-bad", "why"]
    dense, experts = rows.loc["ffn-dense_source-good"], rows.loc["ffn-experts_source-good"]
    assert dense["parameters"] == dense["active_parameters"]
    assert experts["parameters"] > experts["active_parameters"] > 0
    assert dense["samples"] == pytest.approx(12)
    assert dense["loss"] > 0
    assert dense["flops"] > 0
    assert any(name.startswith("score/") and name.endswith("R@1") for name in rows.columns)
    page = (tmp_path / "runs" / "sweep.html").read_text()
    assert "2 complete" in page
    assert "1 failed" in page
    failure = read_failure(tmp_path / "runs" / "ffn-dense_source-bad")
    assert failure is not None and failure.code == 2


def test_a_sweep_that_is_stopped_saves_what_runs_and_begins_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace("steps: 3", "steps: 100000"))
    (tmp_path / "s.yaml").write_text("{name: s, plan: plan.yaml, axes: {seed: [0, 1]}}")
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "launcher.cli", "sweep", "run", str(tmp_path / "s.yaml"), "--folder", str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        metrics = runs / "seed-0" / "stages" / "01-contrast" / "metrics.jsonl"
        limit = patience.Limit(60)
        while not metrics.is_file() and running.poll() is None and not limit.passed():
            time.sleep(0.1)
        running.terminate()
        assert patience.wait(running, 60) == 143
        assert "seed-0: stopped" in running.stdout.read()
    assert list(RunFolder(runs / "seed-0").stage(0, "contrast").checkpoints.glob("step-*"))
    assert not (runs / "seed-1").exists()
    assert read_failure(runs / "seed-0") is None
