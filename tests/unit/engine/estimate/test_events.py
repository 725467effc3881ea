"""The simulator, against times worked out by hand."""

import pytest

from engine.estimate.activities import one_forward_one_backward
from engine.estimate.events import Activity, Network, simulate


def test_resources_do_one_thing_at_a_time_and_wait_for_each_other() -> None:
    activities = [
        Activity("device", 2.0, (), "a"),  # 0 to 2
        Activity("device", 1.0, (), "b"),  # 2 to 3: ready as early, but behind in the list
        Activity("link", 5.0, (0,), "c"),  # 2 to 7
        Activity("device", 1.0, (2,), "d"),  # 7 to 8
    ]
    timeline = simulate(activities)
    assert timeline.begins == [0.0, 2.0, 2.0, 7.0] and timeline.ends == [2.0, 3.0, 7.0, 8.0]
    assert timeline.seconds == 8.0 and timeline.busy == {"device": 4.0, "link": 5.0}
    assert simulate(activities, {"device": 2.0}).ends == [4.0, 6.0, 9.0, 11.0]


def test_a_network_is_simulated_with_several_durations() -> None:
    activities = [
        Activity("device", 2.0, (), "a"),
        Activity("link", 5.0, (0,), "c"),
        Activity("device", 1.0, (1,), "d"),
    ]
    network = Network(activities)
    assert network.timeline(without="c").ends == [2.0, 2.0, 3.0]
    assert network.timeline({"link": 2.0}).ends == [2.0, 12.0, 13.0]
    assert network.timeline() == simulate(activities)


def test_what_was_ready_first_begins_first() -> None:
    activities = [
        Activity("device", 3.0, (), "first"),
        Activity("link", 2.0, (), "late"),
        Activity("link", 1.0, (), "later"),
        Activity("device", 1.0, (2,), "ready at 3"),
        Activity("device", 1.0, (1,), "ready at 2"),
    ]
    assert simulate(activities).begins == [0.0, 0.0, 2.0, 4.0, 3.0]


def test_a_circle_is_refused() -> None:
    activities = [Activity("a", 1.0, (1,), ""), Activity("b", 1.0, (0,), "")]
    with pytest.raises(ValueError, match="activities wait for each other in a circle: 2 of 2, first number 0"):
        simulate(activities)


def test_a_pipeline_stage_goes_ahead_by_as_many_as_follow_it() -> None:
    f, b = "forward", "backward"
    assert one_forward_one_backward(0, 3, 4) == [
        *((f, 0), (f, 1), (f, 2), (b, 0), (f, 3), (b, 1), (b, 2), (b, 3)),
    ]
    assert one_forward_one_backward(2, 3, 2) == [(f, 0), (b, 0), (f, 1), (b, 1)]
