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
    """Works out when each activity begins and ends; ``Network`` does it for several durations of the same activities.

    Args:
        activities: In any order; their dependencies have no cycle.
        stretch: How many times as long each resource takes; 1 for those that are not named.

    Raises:
        ValueError: The dependencies have a cycle.
    """
    return Network(activities).timeline(stretch)


class Network:
    """Activities with their dependencies, to be simulated with several durations."""

    def __init__(self, activities: Sequence[Activity]) -> None:
        """Reads the dependencies.

        Args:
            activities: In any order; their dependencies have no cycle.
        """
        self.activities = activities
        self.names = sorted({activity.resource for activity in activities})
        numbers = {name: number for number, name in enumerate(self.names)}
        self._resources = [numbers[activity.resource] for activity in activities]
        self._missing = [len(activity.after) for activity in activities]
        self._followers: list[list[int]] = [[] for _ in activities]
        for number, activity in enumerate(activities):
            for before in activity.after:
                self._followers[before].append(number)

    def timeline(self, stretch: Mapping[str, float] | None = None, without: str | None = None) -> Timeline:
        """Works out when each activity begins and ends.

        Args:
            stretch: How many times as long each resource takes; 1 for those that are not named.
            without: A cause whose activities take no time.

        Raises:
            ValueError: The dependencies have a cycle.
        """
        resources, followers, missing = self._resources, self._followers, self._missing.copy()
        seconds = self._seconds({} if stretch is None else stretch, without)
        begins, ends = [0.0] * len(seconds), [-1.0] * len(seconds)
        busy = dict.fromkeys(range(len(self.names)), 0.0)
        working = [False] * len(self.names)
        waiting: list[list[tuple[float, int]]] = [[] for _ in self.names]
        events: list[tuple[float, int]] = []  # ends of running activities

        def begin_next(resource: int, now: float) -> None:
            if working[resource] or not waiting[resource]:
                return
            _, number = heapq.heappop(waiting[resource])
            working[resource] = True
            begins[number] = now
            busy[resource] += seconds[number]
            heapq.heappush(events, (now + seconds[number], number))

        for number, count in enumerate(missing):
            if count == 0:
                heapq.heappush(waiting[resources[number]], (0.0, number))
        for resource in range(len(self.names)):
            begin_next(resource, 0.0)
        while events:
            now, number = heapq.heappop(events)
            ends[number] = now
            own = resources[number]
            working[own] = False
            changed = [own]
            for follower in followers[number]:
                missing[follower] -= 1
                if missing[follower] == 0:
                    resource = resources[follower]
                    heapq.heappush(waiting[resource], (now, follower))
                    if resource != own:
                        changed.append(resource)
            for resource in changed if len(changed) == 1 else sorted(changed):
                begin_next(resource, now)
        stuck = [number for number, end in enumerate(ends) if end < 0]
        if stuck:
            raise ValueError(
                f"activities wait for each other in a circle: {len(stuck)} of {len(ends)}, first number {stuck[0]}"
            )
        return Timeline(begins, ends, {self.names[resource]: time for resource, time in busy.items()})

    def _seconds(self, stretch: Mapping[str, float], without: str | None) -> list[float]:
        """How long each activity takes."""
        return [
            0.0 if one.cause == without else one.seconds * stretch.get(one.resource, 1.0) for one in self.activities
        ]
