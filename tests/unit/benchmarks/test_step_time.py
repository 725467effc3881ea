"""Comparison of two checkouts, with stand-ins that only spend time and record it."""

from pathlib import Path

import pytest

from benchmarks.step_time import Choice, StepTime, compare, main, table

COMMAND = """
import json, pathlib, sys, time
name, folder = sys.argv[sys.argv.index("--stage") + 1], sys.argv[sys.argv.index("--run-folder") + 1]
assert f"stages.{name}.steps=8" in sys.argv and "stages.first.evaluate.tasks=[]" in sys.argv
log = pathlib.Path(folder) / "stages" / f"01-{name}" / "metrics.jsonl"
log.parent.mkdir(parents=True)
for step in range(1, 9):
    seconds = 0.5 if step <= 2 else SECONDS
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass
    with log.open("a") as file:
        file.write(json.dumps({"event": "train", "speed": {"seconds_per_step": seconds}}) + "\\n")
"""


@pytest.fixture
def checkouts(tmp_path: Path) -> list[Path]:
    for name, seconds in (("before", "0.1"), ("after", "0.2")):
        (tmp_path / name / "launcher").mkdir(parents=True)
        (tmp_path / name / "launcher" / "__init__.py").touch()
        (tmp_path / name / "launcher" / "cli.py").write_text(COMMAND.replace("SECONDS", seconds))
        (tmp_path / name / "configs" / "plans").mkdir(parents=True)
        (tmp_path / name / "configs" / "plans" / "own.yaml").write_text("stages: [{name: first}, {name: second}]")
    return [tmp_path / "before", tmp_path / "after"]


def test_what_takes_twice_the_time_has_a_ratio_of_two(checkouts: list[Path]) -> None:
    found = compare(checkouts, "own", Choice(steps=8, skip=2), rounds=2)
    (before, after) = found["first"]
    assert [taken.clock for taken in before] == pytest.approx([0.1, 0.1])
    assert [taken.clock for taken in after] == pytest.approx([0.2, 0.2])
    # A line is seen some time after it was written, on a busy machine a part of a step.
    assert [taken.cores for taken in before] == pytest.approx([0.1, 0.1], abs=0.04)
    assert [taken.cores for taken in after] == pytest.approx([0.2, 0.2], abs=0.04)


def test_ratios_are_taken_within_a_round() -> None:
    before, after = [StepTime(1, 2), StepTime(2, 4), StepTime(4, 8)], [StepTime(1, 1), StepTime(2, 2), StepTime(6, 4)]
    (_, line) = table({"one": (before, after)}).splitlines()
    assert "2.00 -> 2.00" in line and "1.000 (1.000 to 1.500)" in line
    assert "4.00 -> 2.00" in line and "0.500 (0.500 to 0.500)" in line


def test_a_run_that_fails_says_what_it_said(checkouts: list[Path]) -> None:
    (checkouts[1] / "launcher" / "cli.py").write_text("raise SystemExit('no such plan')")
    with pytest.raises(RuntimeError, match=r"ended with 1:\nno such plan"):
        compare(checkouts, "own", Choice(steps=8, skip=2), rounds=1)


def test_a_folder_without_the_code_is_refused(
    checkouts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([str(checkouts[0]), str(tmp_path / "empty")])
    assert "its runs would take the code of" in capsys.readouterr().err
