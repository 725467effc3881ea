"""Processes that make shards, and a watch over them: an icon that crashes or hangs the renderer costs one icon only.

A worker marks the icon that it draws in shared memory. When it dies, or stays at one icon for too long, the shard is
begun again by a new worker without that icon.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from omnivl.data.icons.draw import Cause
from omnivl.data.icons.job import NO_ICON, Part, Refusal, ShardJob, run_job

LONGEST_SECONDS = 60.0
"""Of one icon; the slowest of the package takes less than one."""

_LOOK_SECONDS = 0.5

Work = Callable[[ShardJob, Mapping[int, Refusal], Callable[[int], None]], Part]
"""As ``run_job``."""


@dataclass
class _Worker:
    """A process, and what it is at."""

    process: Any
    connection: Connection
    place: Any
    job: ShardJob
    given_up: dict[int, Refusal] = field(default_factory=dict)
    seen_place: int = NO_ICON
    seen_at: float = 0.0


class Crew:
    """Makes shards with several processes, in any order."""

    def __init__(
        self,
        jobs: Iterator[ShardJob],
        processes: int,
        longest_seconds: float = LONGEST_SECONDS,
        work: Work = run_job,
    ) -> None:
        """Describes the work.

        Args:
            jobs: Taken one at a time, when a process is free: they hold the texts of the drawings.
            processes: 1 or more.
            longest_seconds: Of one icon.
            work: What a process does with a job; can be pickled.
        """
        self._jobs, self._processes, self._longest, self._make = jobs, processes, longest_seconds, work
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def parts(self) -> Iterator[tuple[ShardJob, Part]]:
        """Each shard when it is done.

        Raises:
            RuntimeError: A worker ended while it drew no icon, so that none can be left out.
        """
        try:
            for job in self._jobs:
                self._start(job)
                if len(self._workers) == self._processes:
                    break
            while self._workers:
                yield from self._look()
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()

    def _start(self, job: ShardJob, given_up: dict[int, Refusal] | None = None) -> None:
        here, there = self._context.Pipe()
        place = self._context.Value("q", NO_ICON, lock=False)
        process = self._context.Process(target=_work, args=(there, place, self._make), daemon=True)
        process.start()
        there.close()
        worker = _Worker(process, here, place, job, given_up or {}, seen_at=time.monotonic())
        self._workers.append(worker)
        self._send(worker)

    def _send(self, worker: _Worker) -> None:
        worker.place.value, worker.seen_place, worker.seen_at = NO_ICON, NO_ICON, time.monotonic()
        try:
            worker.connection.send((worker.job, worker.given_up))
        except OSError:  # it has died; the next look finds it
            return

    def _look(self) -> Iterator[tuple[ShardJob, Part]]:
        """Waits a while; takes what is done, gives out new work, replaces workers that died or hang."""
        ready = wait([worker.connection for worker in self._workers], timeout=_LOOK_SECONDS)
        for worker in list(self._workers):
            if worker.connection in ready:
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    self._replace(worker, "crashed", f"the renderer ended with status {worker.process.exitcode}")
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                yield worker.job, answer
                self._go_on(worker)
            elif self._hangs(worker):
                worker.process.kill()
                worker.process.join()
                self._replace(worker, "too_slow", f"not drawn in {self._longest:g} seconds")

    def _go_on(self, worker: _Worker) -> None:
        job = next(self._jobs, None)
        if job is None:
            worker.connection.send(None)
            worker.process.join()
            self._workers.remove(worker)
        else:
            worker.job, worker.given_up = job, {}
            self._send(worker)

    def _hangs(self, worker: _Worker) -> bool:
        place, now = worker.place.value, time.monotonic()
        if place != worker.seen_place:
            worker.seen_place, worker.seen_at = place, now
        return bool(place != NO_ICON and now - worker.seen_at > self._longest)

    def _replace(self, worker: _Worker, cause: Cause, detail: str) -> None:
        self._workers.remove(worker)
        place = worker.place.value
        if place == NO_ICON or place in worker.given_up:
            raise RuntimeError(f"the worker of {worker.job.path.name} ended, and not while it drew an icon: {detail}")
        name = worker.job.icons[place].name
        refusal = Refusal(f"{worker.job.prefix}:{name}", cause, detail)
        self._start(worker.job, {**worker.given_up, place: refusal})


def _work(connection: Connection, place: Any, make: Work) -> None:
    """The loop of a worker: jobs in, parts out, until it is told None or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers

    def mark(number: int) -> None:
        place.value = number

    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            return
        job, given_up = message
        try:
            answer: Part | BaseException = make(job, given_up, mark)
        except Exception as error:
            answer = error
        connection.send(answer)
