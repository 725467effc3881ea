import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.disk.run_folder import RunFolder, RunFolderError, check_same_plan, differing_fields

PLAN: dict[str, Any] = {
    "name": "a",
    "seed": 0,
    "logging": {"every": 10},
    "stages": [
        {"name": "one", "steps": 5, "optimizer": {"lr": 1e-3}, "evaluate": {"every": 0}},
        {"name": "two", "steps": 5, "optimizer": {"lr": 1e-3}},
    ],
}


def changed(**values: Any) -> dict[str, Any]:
    """PLAN with ``stages__0__steps=6`` and the like put in."""
    import copy

    plan = copy.deepcopy(PLAN)
    for path, value in values.items():
        holder: Any = plan
        *parents, last = path.split("__")
        for part in parents:
            holder = holder[int(part)] if part.isdigit() else holder[part]
        holder[last] = value
    return plan


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.disk.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError) as caught, RunFolder(tmp_path / "run").lock():
            pytest.fail("the lock was given twice")
        assert str(caught.value) == (
            f"{tmp_path / 'run'}: another run is writing here: process {other.pid} on host {socket.gethostname()}. "
            "Wait for it, stop it, or choose another folder with --run-folder."
        )
        other.kill()  # a killed process holds no lock
        other.wait()
        with RunFolder(tmp_path / "run").lock():
            assert (tmp_path / "run" / "run.lock").read_text().startswith(f"process {os.getpid()} ")


def test_same_plan_and_free_fields_are_accepted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    check_same_plan(run, PLAN, PLAN)
    check_same_plan(run, PLAN, changed(name="b", logging__every=1, stages__0__evaluate__every=3))


def test_other_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught:
        check_same_plan(RunFolder(tmp_path), PLAN, changed(seed=1, stages__1__optimizer__lr=0.01, logging__every=1))
    assert str(caught.value) == (
        f"{tmp_path}: holds a run of another plan:\n"
        "  seed: was 0, is now 1\n"
        "  stages.1.optimizer.lr: was 0.001, is now 0.01\n"
        f"Go on with the earlier plan ({tmp_path / 'plan.yaml'}), start over with --fresh (deletes the earlier run), "
        "or choose another folder with --run-folder."
    )


def test_a_stage_may_become_longer_until_the_next_has_begun(tmp_path: Path) -> None:
    run, longer = RunFolder(tmp_path), changed(stages__0__steps=6)
    check_same_plan(run, PLAN, longer)
    with pytest.raises(RunFolderError, match=r"stages\.0\.steps: was 5, is now 4"):
        check_same_plan(run, PLAN, changed(stages__0__steps=4))
    run.stage(1, "two").checkpoints.mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"stages\.0\.steps: was 5, is now 6"):
        check_same_plan(run, PLAN, longer)
    check_same_plan(run, PLAN, changed(stages__1__steps=6))


def test_a_stage_may_be_added_but_not_taken_away(tmp_path: Path) -> None:
    more = changed(stages=[*PLAN["stages"], {"name": "three", "steps": 1}])
    check_same_plan(RunFolder(tmp_path), PLAN, more)
    with pytest.raises(RunFolderError, match=r"stages\.2: was .*, is now not given"):
        check_same_plan(RunFolder(tmp_path), more, PLAN)


def test_differing_fields() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 0}
    now = {"a": 1, "b": {"c": [1, 3, 4], "d": "x"}, "new": {}}
    assert differing_fields(before, now) == [
        ("b.c.1", 2, 3),
        ("b.c.2", None, 4),
        ("b.d", None, "x"),
        ("gone", 0, None),
        ("new", None, {}),
    ]


def test_completion_and_clearing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    one, two = run.stage(0, "one"), run.stage(1, "two")
    for stage in (one, two):
        stage.path.mkdir(parents=True)
        assert stage.completed_steps() is None
        stage.mark_complete(5)
        assert stage.completed_steps() == 5
    assert one.path == tmp_path / "stages" / "01-one"
    run.plan.write_text("name: a")
    run.clear(first_stage=1)
    assert one.completed_steps() == 5
    assert not two.path.exists()
    assert not run.plan.exists()
    run.clear()
    assert not one.path.exists()


def test_a_run_of_an_earlier_version_may_go_on_where_streams_have_a_time_limit(tmp_path: Path) -> None:
    earlier, now = (
        {**PLAN, "loader": fields} for fields in ({"seed": 1}, {"seed": 1, "stream_timeout_seconds": 300.0})
    )
    check_same_plan(RunFolder(tmp_path), earlier, now)
