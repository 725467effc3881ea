"""A discrete-event simulator: activities on resources, each of which does one at a time.

An activity begins when all activities that it waits for are done and its resource is free. If several could begin, the
one that was ready first begins; of equal ones, the first in the list. The result is a pure function of the activities.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """Work that keeps a resource busy for a time.

    Attributes:
        resource: Name of the resource.
        seconds: How long.
        after: Indexes in the list of the activities that have to be done before.
        cause: Name under which its time is reported.
    """

    resource: str
    seconds: float
    after: tuple[int, ...]
    cause: str


@dataclass(frozen=True)
class Timeline:
    """When each activity began and ended.

    Attributes:
        begins: Seconds, activity by activity.
        ends: Seconds, activity by activity.
        busy: Seconds that each resource worked.
    """

    begins: Sequence[float]
    ends: Sequence[float]
    busy: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """From the start to the end of the last activity."""
        return max(self.ends, default=0.0)


def simulate(activities: Sequence[Activity], stretch: Mapping[str, float] | None = None) -> Timeline:
    """Works out when each activity begins and ends.

    Args:
        activities: In any order; their dependencies have no cycle.
        stretch: How many times as long each resource takes; 1 for those that are not named.

    Raises:
        ValueError: The dependencies have a cycle.
    """
    stretch = {} if stretch is None else stretch
    followers: list[list[int]] = [[] for _ in activities]
    missing = [len(activity.after) for activity in activities]
    for number, activity in enumerate(activities):
        for before in activity.after:
            followers[before].append(number)
    begins, ends = [0.0] * len(activities), [-1.0] * len(activities)
    busy: dict[str, float] = {}
    waiting: dict[str, list[tuple[float, int]]] = {}
    working: set[str] = set()
    events: list[tuple[float, int]] = []  # ends of running activities

    def begin_next(resource: str, now: float) -> None:
        if resource in working or not waiting.get(resource):
            return
        _, number = heapq.heappop(waiting[resource])
        working.add(resource)
        seconds = activities[number].seconds * stretch.get(resource, 1.0)
        begins[number] = now
        busy[resource] = busy.get(resource, 0.0) + seconds
        heapq.heappush(events, (now + seconds, number))

    for number, activity in enumerate(activities):
        if missing[number] == 0:
            heapq.heappush(waiting.setdefault(activity.resource, []), (0.0, number))
    for resource in list(waiting):
        begin_next(resource, 0.0)
    while events:
        now, number = heapq.heappop(events)
        ends[number] = now
        working.discard(activities[number].resource)
        changed = {activities[number].resource}
        for follower in followers[number]:
            missing[follower] -= 1
            if missing[follower] == 0:
                resource = activities[follower].resource
                heapq.heappush(waiting.setdefault(resource, []), (now, follower))
                changed.add(resource)
        for resource in sorted(changed):
            begin_next(resource, now)
    stuck = [number for number, end in enumerate(ends) if end < 0]
    if stuck:
        raise ValueError(
            f"activities wait for each other in a circle: {len(stuck)} of {len(activities)}, first number {stuck[0]}"
        )
    return Timeline(begins, ends, busy)
