"""Scores by time while a stage trains: they change no bit of it, and go on after a stop."""

import itertools
import json
import signal
from typing import TYPE_CHECKING

import patience
import pytest

from engine.telemetry.curve import read_curve
from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TASKS = (
    "tasks: [{kind: retrieval, where: {split: [val], style: [twemoji]}, max_samples: 12, baseline: {max_samples: 8}}]"
)
OFTEN = f"stages.spatial.evaluate.curve={{every_seconds: 0.001, largest_share: 1.0, {TASKS}}}"

LAYOUTS = {
    "plain": ("parallel.host=plain", "launch.processes=1"),
    "zero3": ("parallel.host=zero", "parallel.zero_stage=3", "launch.processes=2"),
    "pipeline": (
        *("parallel.host=pipeline", "parallel.pipeline_stages=2", "parallel.zero_stage=1", "launch.processes=2"),
        "stages.spatial.objectives=[mlm, univlc]",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", ["plain", *(pytest.param(layout, marks=pytest.mark.full) for layout in ("zero3", "pipeline"))]
)
def test_a_run_with_a_curve_ends_with_the_bits_of_one_without(pretraining: "Pretraining", layout: str) -> None:
    """Weights, moments, generators, positions in the data and lines of metrics, with dropout in training."""
    arguments = (*LAYOUTS[layout], "logging.every=1", "stages.spatial.steps=16")
    without = pretraining.run("without", *arguments)
    shown = pretraining.run("with", *arguments, OFTEN)
    points = read_curve(pretraining.stage("with") / "curve.jsonl")
    assert points[0].step == 0
    assert len(points) >= 3, "evaluated between steps, or nothing is compared"
    assert all(0 <= one.scores["retrieval/image->text R@1"] <= 1 for one in points)
    assert all(one.chance["retrieval/image->text R@1"] == pytest.approx(1 / 12) for one in points)
    assert points[0].pixels == points[-1].pixels != {}
    assert shown.count("retrieval/image->text R@1") == len(points)
    assert "R@1" not in without
    assert not (pretraining.stage("without") / "curve.jsonl").exists()
    ends = [pretraining.final_state(pretraining.stage(name)) for name in ("without", "with")]
    assert not pretraining.differences(*ends)


def test_a_curve_goes_on_after_a_stop_and_has_no_step_twice(pretraining: "Pretraining") -> None:
    """Points after the checkpoint that the killed run goes on from are taken anew; earlier ones stay as they are."""
    file = pretraining.stage("run") / "curve.jsonl"
    arguments = ("stages.spatial.steps=40", "logging.tensorboard=true", OFTEN)
    checkpoint = pretraining.stage("run") / "checkpoints" / "step-000003" / "manifest.json"
    killed = pretraining.run_until(
        "run", lambda: checkpoint.exists() and read_curve(file)[-1].step > 3, signal.SIGKILL, *arguments
    )
    patience.communicate(killed, 60)
    before = file.read_bytes()
    with file.open("ab") as torn:
        torn.write(b'{"step": 9, "chan')
    output = pretraining.run("run", *arguments)
    resumed = int(output.partition("going on after step ")[2].split()[0])
    kept = [line for line in before.splitlines() if json.loads(line)["step"] <= resumed]
    assert kept
    assert file.read_bytes().splitlines()[: len(kept)] == kept
    points = read_curve(file)
    steps = [one.step for one in points]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[len(kept)] > resumed
    assert all(earlier.seconds <= later.seconds for earlier, later in itertools.pairwise(points))
    assert points[-1].pixels == points[0].pixels
    shown = [line for line in output.splitlines() if "R@1" in line]
    assert f"step {steps[len(kept) - 1]}/40" in shown[0], "the newest point of the earlier start is shown again"
    assert [line["step"] for line in read_metrics(pretraining.stage("run") / "metrics.jsonl")][-1] == 40
    page = (pretraining.folder / "run" / "report.html").read_text()
    assert "Scores by time" in page
    assert f"{len(points)} evaluations of 12 queries" in page
