"""``omnivl sweep run --on slurm`` looks at what its runs read before it writes a job."""

import json
import re
from pathlib import Path

import pytest
from broken_inputs import plan_of, write_files, write_plan
from typer.testing import CliRunner

from engine.errors import PlanError
from launcher.cli import app
from omnivl.data.sources import glance as glances


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs of one plan, half of which name a shard of their own; the plan's second stage reads few samples."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    content = plan_of(tmp_path)
    content["stages"][1]["batch"] = {"micro_batch_size_per_gpu": 64}
    write_plan(tmp_path, content)
    file = tmp_path / "sweep.yaml"
    axes = {"seed": [0, 1], "stages.third.data.0.source": [f"{tmp_path}/good-000.tar", f"{tmp_path}/good-001.tar"]}
    file.write_text(f"name: s\nplan: plan.yaml\naxes: {json.dumps(axes)}\n")
    return file


def run(file: Path, *options: str) -> list[str]:
    """What is told of the look, on standard error."""
    result = CliRunner().invoke(app, ["sweep", "run", str(file), "--on", "slurm", "--dry-run", *options])
    if result.exception is not None:
        raise result.exception
    return result.stderr.splitlines()


def test_what_is_found_in_all_runs_is_told_once(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    indexes = glances._indexes
    monkeypatch.setattr(glances, "_indexes", lambda paths, *given: looked.append(paths) or indexes(paths, *given))
    heading, note = run(sweep)
    assert heading == "Not looked at, or perhaps not meant:"
    assert note.startswith(f"{sweep.parent}/plan.yaml:") and ": stages.1.data.0.source: 24 samples for" in note
    assert len(looked) == 4, "three ways of reading in the base plan and one more source, each for all runs together"
    assert run(sweep, "--offline") == []


def test_problems_of_some_runs_are_told_with_their_names(sweep: Path) -> None:
    sweep.write_text(sweep.read_text().replace("good-001", "good-777"))
    with pytest.raises(PlanError) as refused:
        run(sweep)
    (problem,) = refused.value.problems
    said = r"runs seed-0_\S+-good-777.tar, seed-1_\S+-good-777.tar: override 'stages.third.data.0.source="
    assert re.match(said, problem), problem
    assert "good-777.tar (No such file or directory)" in problem
    assert not (sweep.parent / "runs").exists(), "no job is written"


def test_runs_on_this_machine_begin_without_a_look_if_asked(sweep: Path) -> None:
    words = ["sweep", "run", str(sweep), "--dry-run"]
    for more in ([], ["--offline"]):
        lines = CliRunner().invoke(app, [*words, *more]).stdout.splitlines()
        assert len(lines) == 4 and all(line.split()[-1] == "--offline" for line in lines) == bool(more)
