import json
from pathlib import Path

from engine.disk.checkpoint import checkpoint_steps, step_folder
from engine.disk.rollback import (
    Rollback,
    RolledBackError,
    position_in_data,
    read_rollbacks,
    remove_void,
    write_rollbacks,
)

FIRST = Rollback(7, 9, "a spike", ({"micro_step": 9, "shards": {"a": 1}}, {"micro_step": 9, "shards": {"a": 2}}))
SECOND = Rollback(5, 6, "another", ())


def write(folder: Path, step: int, rollbacks: int | None = None) -> None:
    step_folder(folder, step).mkdir()
    known = {} if rollbacks is None else {"rollbacks": rollbacks}
    (step_folder(folder, step) / "trainer.json").write_text(json.dumps({"step": step, **known}))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "rollbacks.json"
    assert read_rollbacks(file) == ()
    write_rollbacks(file, (FIRST, SECOND))
    assert read_rollbacks(file) == (FIRST, SECOND)
    assert [path.name for path in tmp_path.iterdir()] == ["rollbacks.json"]


def test_checkpoints_from_the_first_bad_step_on_are_void(tmp_path: Path) -> None:
    for step in (3, 6, 7, 8):
        write(tmp_path, step)  # as versions without rollbacks wrote them
    remove_void(tmp_path, (FIRST,))
    assert checkpoint_steps(tmp_path) == [3, 6]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000003", "step-000006"]


def test_checkpoints_that_know_of_a_rollback_outlive_it(tmp_path: Path) -> None:
    for step, rollbacks in ((4, 0), (5, 0), (6, 1), (7, 1), (9, 2)):
        write(tmp_path, step, rollbacks)
    remove_void(tmp_path, (FIRST, SECOND))
    assert checkpoint_steps(tmp_path) == [4, 9]


def test_a_torn_checkpoint_is_left_to_those_who_look_for_it(tmp_path: Path) -> None:
    write(tmp_path, 8)
    (step_folder(tmp_path, 8) / "trainer.json").write_text('{"step": 8, "roll')
    remove_void(tmp_path, (FIRST,))
    assert checkpoint_steps(tmp_path) == [8]


def test_the_place_in_the_data_is_that_of_the_last_rollback_that_left_some_out() -> None:
    assert position_in_data((), 0, 2) is None
    assert position_in_data((SECOND,), 0, 2) is None
    assert position_in_data((FIRST, SECOND), 1, 2) == {"micro_step": 9, "shards": {"a": 2}}
    assert position_in_data((FIRST,), 3, 4) == {"micro_step": 9, "shards": {}}, "another number of processes"


def test_the_message_says_where_to_and_with_which_data() -> None:
    assert str(RolledBackError(FIRST, 1, 2)) == (
        "step 9: a spike; going back to before step 7, leaving out the data since then (rollback 1 of 2)"
    )
    assert "with the same data (rollback 2 of 2)" in str(RolledBackError(SECOND, 2, 2))
