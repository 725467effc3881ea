"""Losses that spike or are not finite: the stage rolls back, and ends as if the data in between did not exist."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patience
import pytest

from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(300)]

ARGUMENTS = (
    *("stages.spatial.steps=9", "checkpoint.every=2", "checkpoint.keep_last=1", "logging.every=3"),
    *("guard.spike_factor=10", "guard.spike_window=4", "guard.spike_steps=2", "guard.max_skipped_steps=2"),
    "stages.spatial.data=[{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]",
)
LAYOUTS = {
    "plain": ("parallel.host=plain", "launch.processes=1"),
    "zero3": ("parallel.host=zero", "parallel.zero_stage=3", "launch.processes=2"),
    "pipeline": ("parallel.host=pipeline", "parallel.zero_stage=1", "parallel.pipeline_stages=2", "launch.processes=2"),
}
SPOILT = [10, 14]
"""Micro-batches of steps 6 and 7: a checkpoint is taken after each of steps 4 and 6, and 7 is one bad step too many."""


def spoil(monkeypatch: pytest.MonkeyPatch, data: str, micro_steps: list[int]) -> None:
    monkeypatch.setenv("OMNIVL_TEST_FAULT", json.dumps({"data": data, "micro_steps": micro_steps}))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"), prepend=os.pathsep)


def without_rollbacks(pretraining: "Pretraining", name: str) -> dict[str, Any]:
    state: dict[str, Any] = pretraining.final_state(pretraining.stage(name))
    state["metrics"] = [record for record in state["metrics"] if record["event"] != "rollback"]
    return state


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ("spike", "plain"),
        pytest.param("nan", "plain", marks=pytest.mark.full),
        pytest.param("spike", "zero3", marks=pytest.mark.full),
        pytest.param("nan", "pipeline", marks=pytest.mark.full),
    ],
)
def test_a_stage_goes_back_and_leaves_the_data_out(
    pretraining: "Pretraining",
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    data: str,
    layout: str,
) -> None:
    """Killed right after the decision, too."""
    what = {
        "spike": "losses spike, and SIGKILL after going back",
        "nan": "losses are NaN, and SIGKILL after going back",
    }
    record_property("fault", f"{layout}, {what[data]}")
    arguments = (*ARGUMENTS, *LAYOUTS[layout], "guard.rollbacks=1")
    # From behind step 4 on, to which the other run goes back: what it saw in the good step 5 is left out as well.
    spoil(monkeypatch, "absent", [8, SPOILT[1]])
    pretraining.run("never", *arguments)
    spoil(monkeypatch, data, SPOILT)
    output = pretraining.run("back", *arguments)
    what = {"spike": "is above its band (up to ", "nan": "mlm, univlc not finite in 2 steps in a row"}[data]
    assert what in output
    assert "; going back to before step 6, leaving out the data since then (rollback 1 of 1)" in output
    assert "going on after step 4" in output
    expected = without_rollbacks(pretraining, "never")
    assert not pretraining.differences(expected, without_rollbacks(pretraining, "back"))
    stage = pretraining.stage("back")
    (event,) = (one for one in read_metrics(stage / "metrics.jsonl") if one["event"] == "rollback")
    assert (event["step"], event["rollback"]) == (4, {"first_bad": 6, "step": 7})
    assert what in event["reason"]
    assert what in (pretraining.folder / "back" / "report.html").read_text()

    decided = pretraining.stage("killed") / "rollbacks.json"
    killed = pretraining.run_until("killed", decided.exists, signal.SIGKILL, *arguments)
    patience.communicate(killed, 60)
    assert not (decided.parent / "complete.json").exists(), "killed too late to test anything"
    output = pretraining.run("killed", *arguments)
    assert "going on after step 4" in output
    assert "going back" not in output, "what was decided is not decided again"
    assert not pretraining.differences(
        pretraining.final_state(pretraining.stage("back")), pretraining.final_state(pretraining.stage("killed"))
    )


@pytest.mark.full
def test_there_is_an_end_to_going_back(pretraining: "Pretraining", monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "spike", [SPOILT[0], 10**6])
    output = pretraining.run("run", *ARGUMENTS, *LAYOUTS["plain"], "guard.rollbacks=1", code=2)
    assert "(rollback 1 of 1)" in output
    assert (
        "in 2 steps, which is guard.spike_steps, after as many rollbacks as guard.rollbacks allows (1). Lower "
        in output
    )
    assert "Traceback" not in output
    kept = {path.name for path in (pretraining.stage("run") / "checkpoints").iterdir()}
    assert "step-000004" in kept, "the good one is still there"
