"""The simulator, against times worked out by hand."""

import pytest

from engine.estimate.events import Task, simulate
from engine.estimate.tasks import one_forward_one_backward


def test_resources_do_one_thing_at_a_time_and_wait_for_each_other() -> None:
    tasks = [
        Task("device", 2.0, (), "a"),  # 0 to 2
        Task("device", 1.0, (), "b"),  # 2 to 3: ready as early, but behind in the list
        Task("link", 5.0, (0,), "c"),  # 2 to 7
        Task("device", 1.0, (2,), "d"),  # 7 to 8
    ]
    timeline = simulate(tasks)
    assert timeline.begins == [0.0, 2.0, 2.0, 7.0] and timeline.ends == [2.0, 3.0, 7.0, 8.0]
    assert timeline.seconds == 8.0 and timeline.busy == {"device": 4.0, "link": 5.0}
    assert simulate(tasks, {"device": 2.0}).ends == [4.0, 6.0, 9.0, 11.0]


def test_what_was_ready_first_begins_first() -> None:
    tasks = [
        Task("device", 3.0, (), "first"),
        Task("link", 2.0, (), "late"),
        Task("link", 1.0, (), "later"),
        Task("device", 1.0, (2,), "ready at 3"),
        Task("device", 1.0, (1,), "ready at 2"),
    ]
    assert simulate(tasks).begins == [0.0, 0.0, 2.0, 4.0, 3.0]


def test_a_circle_is_refused() -> None:
    tasks = [Task("a", 1.0, (1,), ""), Task("b", 1.0, (0,), "")]
    with pytest.raises(ValueError, match="tasks wait for each other in a circle: 2 of 2, first number 0"):
        simulate(tasks)


def test_a_pipeline_stage_goes_ahead_by_as_many_as_follow_it() -> None:
    f, b = "forward", "backward"
    assert one_forward_one_backward(0, 3, 4) == [
        *((f, 0), (f, 1), (f, 2), (b, 0), (f, 3), (b, 1), (b, 2), (b, 3)),
    ]
    assert one_forward_one_backward(2, 3, 2) == [(f, 0), (b, 0), (f, 1), (b, 1)]
