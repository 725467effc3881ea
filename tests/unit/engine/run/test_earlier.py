"""What an earlier start left in a run's folder is read once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.disk.run_folder import RunFolder
from engine.plan.parse import parse_plan
from engine.run import earlier
from engine.run.entrance import RunOptions, enter
from engine.run.preflight.findings import Look
from engine.run.preflight.folder import look_at_folder

TEXT = """
name: run
model: {preset: tiny}
parallel: {host: plain, precision: PRECISION}
batch: {micro_batch_size_per_gpu: 4}
stages:
  - name: one
    LENGTH
    data: [{source: emoji, kind: image_text}]
    objectives: [mlm]
"""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the plans that were parsed."""
    places: list[str] = []

    def counted(text: str, place: str, *others: Any) -> Any:
        places.append(place)
        return parse_plan(text, place, *others)

    monkeypatch.setattr(earlier, "parse_plan", counted)
    return places


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Its stage has begun, in bf16 and with five steps."""
    folder = RunFolder(tmp_path / "run")
    folder.stage(0, "one").checkpoints.mkdir(parents=True)
    folder.plan.write_text(TEXT.replace("PRECISION", "bf16").replace("LENGTH", "steps: 5"))
    return folder


OPEN = TEXT.replace("PRECISION", "auto").replace("LENGTH", "epochs: 0.01")


def test_a_start_reads_the_earlier_plan_once(run: RunFolder, parsed: list[str]) -> None:
    """Precision and steps are those of the run."""
    plan, notes = enter(run, parse_plan(OPEN), RunOptions(run.path, offline=True), torch.device("cpu"))
    assert (plan.stages[0].steps, plan.stages[0].parallel.precision) == (5, "bf16")
    assert "it goes on with the 5 steps that it began with" in notes[-1]
    assert parsed == [str(run.plan)]


def test_a_check_reads_the_earlier_plan_once(run: RunFolder, parsed: list[str]) -> None:
    plan, look = parse_plan(OPEN), Look()
    look_at_folder(plan, run, look, earlier.Start())
    assert (look.problems, parsed) == ([], [str(run.plan)])


def test_nothing_is_read_where_all_is_deleted(run: RunFolder, parsed: list[str]) -> None:
    """Whatever lies in the plan's place."""
    run.plan.write_bytes(b"\xff")
    found, look, start = earlier.Earlier(run), Look(), earlier.Start(fresh=True)
    look_at_folder(parse_plan(OPEN), run, look, start)
    assert (look.problems, parsed) == ([], [])
    assert (found.precision(start), found.kept_steps(parse_plan(OPEN), start)) == (None, {})
    assert found.goes_on(parse_plan(OPEN), start) == ([], [])
    look_at_folder(parse_plan(OPEN), run, look, earlier.Start())
    assert "plan.yaml: got a file that cannot be read" in look.problems[0].text


def test_stages_that_stay_keep_their_precision(run: RunFolder) -> None:
    assert earlier.Earlier(run).precision(earlier.Start(fresh=True, stage="one")) == ("bf16", {"one": "bf16"})
