"""A discrete-event simulator: tasks with durations on resources that do one at a time.

A task begins when all that it waits for is done and its resource is free. Of several that could, the one that was ready
first begins; of those the one that stands first in the list. The result is a pure function of the tasks.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Something that keeps a resource busy.

    Attributes:
        resource: Name of what does it.
        seconds: How long.
        after: Places in the list of the tasks that have to be done before.
        cause: What it is for.
    """

    resource: str
    seconds: float
    after: tuple[int, ...]
    cause: str


@dataclass(frozen=True)
class Timeline:
    """When what happened.

    Attributes:
        begins: Seconds, task by task.
        ends: Seconds, task by task.
        busy: Seconds that each resource worked.
    """

    begins: Sequence[float]
    ends: Sequence[float]
    busy: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """From the start to the end of the last task."""
        return max(self.ends, default=0.0)


def simulate(tasks: Sequence[Task], stretch: Mapping[str, float] | None = None) -> Timeline:
    """Lets all tasks happen.

    Args:
        tasks: Each after those that it waits for in the list, or before: only a circle is refused.
        stretch: By what each resource is slower; 1 for those that are not named.

    Raises:
        ValueError: Tasks wait for each other in a circle.
    """
    stretch = {} if stretch is None else stretch
    followers: list[list[int]] = [[] for _ in tasks]
    missing = [len(task.after) for task in tasks]
    for number, task in enumerate(tasks):
        for before in task.after:
            followers[before].append(number)
    begins, ends = [0.0] * len(tasks), [-1.0] * len(tasks)
    busy: dict[str, float] = {}
    waiting: dict[str, list[tuple[float, int]]] = {}
    working: set[str] = set()
    events: list[tuple[float, int]] = []  # ends of tasks at work

    def begin_next(resource: str, now: float) -> None:
        if resource in working or not waiting.get(resource):
            return
        _, number = heapq.heappop(waiting[resource])
        working.add(resource)
        seconds = tasks[number].seconds * stretch.get(resource, 1.0)
        begins[number] = now
        busy[resource] = busy.get(resource, 0.0) + seconds
        heapq.heappush(events, (now + seconds, number))

    for number, task in enumerate(tasks):
        if missing[number] == 0:
            heapq.heappush(waiting.setdefault(task.resource, []), (0.0, number))
    for resource in list(waiting):
        begin_next(resource, 0.0)
    while events:
        now, number = heapq.heappop(events)
        ends[number] = now
        working.discard(tasks[number].resource)
        changed = {tasks[number].resource}
        for follower in followers[number]:
            missing[follower] -= 1
            if missing[follower] == 0:
                resource = tasks[follower].resource
                heapq.heappush(waiting.setdefault(resource, []), (now, follower))
                changed.add(resource)
        for resource in sorted(changed):
            begin_next(resource, now)
    stuck = [number for number, end in enumerate(ends) if end < 0]
    if stuck:
        raise ValueError(
            f"tasks wait for each other in a circle: {len(stuck)} of {len(tasks)}, first number {stuck[0]}"
        )
    return Timeline(begins, ends, busy)
