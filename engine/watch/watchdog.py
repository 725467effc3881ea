"""Reports a process that hangs and ends the run, instead of waiting until the process group times out.

A thread in every process writes a sign of it into the run folder (``engine.watch.heartbeat``) and reads one file. Only
when its own process has made no progress for ``guard.hang_seconds`` does it look at the signs of the others: a process
whose sign no longer changes is stopped or has ended; one that makes progress has to be waited for. If none makes
progress, all write their stack traces, the process that looked reports which one hangs, and all end. This needs no
collective and no main thread. See ``docs/design/0010-faults.md``.

    heartbeats/rank-00000.json      the last sign of each process
    heartbeats/rank-00000.stack     written by C code where a process does not let Python run any more
    heartbeats/hang                 names the folder into which all are to write their stack traces
    hangs/20251124-181530/          rank-00000.txt ..., verdict.txt
"""

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from engine.processes import ranks
from engine.watch.failure import HUNG, Failure
from engine.watch.heartbeat import Heartbeat, Pulse, Sign, read_sign, write_sign

_BEATS_PER_LIMIT = 10
_LONGEST_BEAT_SECONDS = 10.0
_BEATS_TO_SHOW_LIFE = 3
_BEATS_BETWEEN_LOOKS = 8
_STATES: Mapping[str, str] = {
    "T": "it is stopped by a signal",
    "t": "a debugger holds it",
    "D": "it waits for a device or a file system",
    "Z": "it has ended",
}


class Watchdog:
    """The thread of one process, from ``start`` to ``stop``."""

    def __init__(self, heartbeat: Heartbeat, folder: Path, hangs: Path, limit: float) -> None:
        """Prepares the thread.

        Args:
            heartbeat: What the main thread notes.
            folder: For signs, on a file system that all processes share.
            hangs: Folder in which a folder with stack traces is made if the run hangs.
            limit: Seconds without progress after which a process looks at the others.
        """
        self._folder, self._hangs, self._limit = folder, hangs, limit
        self._rank, self._world = ranks.rank(), ranks.world_size()
        self._period = min(limit / _BEATS_PER_LIMIT, _LONGEST_BEAT_SECONDS)
        self._pulse = Pulse(heartbeat, self._rank, self._period)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="omnivl-watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stack = (self._folder / f"rank-{self._rank:05d}.stack").open("wb")
        self._thread.start()

    def stop(self) -> None:
        """Ends watching."""
        self._stopping.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stack.close()

    def _watch(self) -> None:
        running = True
        while running:
            # Fires if this thread cannot run because another one computes without releasing Python's lock.
            faulthandler.dump_traceback_later(0.9 * self._limit, file=self._stack)
            sign = self._pulse.sign()
            with contextlib.suppress(OSError):  # the checkpoint reports a full disk
                write_sign(self._folder, sign)
                if request := _read(self._folder / "hang"):
                    self._obey(Path(request))
                if sign.idle >= self._limit and self._is_first_to_look(sign):
                    self._look()
            running = not self._stopping.wait(self._period)

    def _is_first_to_look(self, sign: Sign) -> bool:
        """One process at a time looks at all others; after some time another one may, in case the first has stopped."""
        turn = int((sign.idle - self._limit) / (_BEATS_BETWEEN_LOOKS * self._period))
        return _create(self._folder / f"look-{sign.number}-{turn}")

    def _look(self) -> None:
        """Looks at all processes; if none has made progress, requests their stack traces and ends the run."""
        before = self._signs()
        self._beat_on(_BEATS_TO_SHOW_LIFE)
        now = self._signs()
        silent = [rank for rank in range(self._world) if not _lives(before[rank], now[rank])]
        if any(sign.idle < self._limit for rank, sign in enumerate(now) if sign is not None and rank not in silent):
            return
        traces = self._hangs / time.strftime("%Y%m%d-%H%M%S")
        if not _create(self._folder / "hang", str(traces)):
            return  # another process has looked at the same time
        self._write_traces(traces)
        time.sleep(_BEATS_TO_SHOW_LIFE * self._period)
        message = verdict(now, silent, self._limit, traces)
        with contextlib.suppress(OSError):  # a full disk must not keep the message from being printed
            for rank in silent:
                stack = _read(self._folder / f"rank-{rank:05d}.stack") or "It gave no sign of life.\n"
                (traces / f"rank-{rank:05d}.txt").write_text(stack)
            (traces / "verdict.txt").write_text(message + "\n")
        Failure(HUNG, message).tell()
        os._exit(HUNG)

    def _obey(self, traces: Path) -> NoReturn:
        """Writes this process' stack traces; ends once the verdict is written, or after a while without one."""
        self._write_traces(traces)
        for _ in range(2 * _BEATS_TO_SHOW_LIFE):
            time.sleep(self._period)
            if (traces / "verdict.txt").is_file():
                break
        os._exit(HUNG)

    def _beat_on(self, beats: int) -> None:
        for _ in range(beats):
            time.sleep(self._period)
            write_sign(self._folder, self._pulse.sign())

    def _signs(self) -> list[Sign | None]:
        return [read_sign(self._folder, rank) for rank in range(self._world)]

    def _write_traces(self, traces: Path) -> None:
        with contextlib.suppress(OSError):
            traces.mkdir(parents=True, exist_ok=True)
            with (traces / f"rank-{self._rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


@contextmanager
def watched(folder: Path, hangs: Path, limit: float) -> Iterator[Heartbeat]:
    """Watches over the block. Called by every process, with an empty folder.

    Args:
        folder: See ``Watchdog``.
        hangs: Likewise.
        limit: Likewise; 0 watches nothing.

    Yields:
        The record of the main thread's progress.
    """
    heartbeat = Heartbeat()
    if limit == 0:
        yield heartbeat
        return
    watchdog = Watchdog(heartbeat, folder, hangs, limit)
    watchdog.start()
    try:
        yield heartbeat
    finally:
        watchdog.stop()


def verdict(signs: Sequence[Sign | None], silent: Sequence[int], limit: float, traces: Path) -> str:
    """Names the processes that hang: those without new signs, else those that do not wait for others, else the last.

    Args:
        signs: The last sign of each process.
        silent: Ranks whose signs no longer change.
        limit: ``guard.hang_seconds``.
        traces: Folder of the stack traces.
    """
    blamed = list(silent) or _not_waiting(signs) or _behind(signs)
    lines = [f"nothing has moved for {limit:g} s, which is guard.hang_seconds"]
    for rank in blamed or range(len(signs)):
        lines.append(f"  rank {rank} {_describe(rank, signs[rank], silent=rank in silent)}")
    others = [sign for sign in signs if sign is not None and blamed and sign.rank not in blamed]
    if not blamed:
        lines[0] += "; all wait for each other, and no rank stands out"
    elif others:
        few = ", ".join(str(sign.rank) for sign in others[:8]) + (" ..." if len(others) > 8 else "")
        lines.append(f"  waiting for {'it' if len(blamed) == 1 else 'them'}: rank {few}, {others[0]}")
    lines.append(f"stack traces of all ranks: {traces}; the same command goes on from the newest whole checkpoint")
    return "\n".join(lines)


def _not_waiting(signs: Sequence[Sign | None]) -> list[int]:
    return [rank for rank, sign in enumerate(signs) if sign is not None and not sign.waiting]


def _behind(signs: Sequence[Sign | None]) -> list[int]:
    numbers = {rank: sign.number for rank, sign in enumerate(signs) if sign is not None}
    behind = [rank for rank, number in numbers.items() if number < max(numbers.values())]
    return [rank for rank in behind if numbers[rank] == min(numbers.values())]


def _describe(rank: int, sign: Sign | None, *, silent: bool) -> str:
    if sign is None:
        return "has never given a sign of life"
    process = f"(process {sign.process} on {sign.host})"
    if not silent:
        return f"{process} hangs: {sign}"
    state = _state_of(sign)
    return f"{process} gives no sign of life{f': {state}' if state else ''}; last seen in {sign}"


def _state_of(sign: Sign) -> str | None:
    """The operating system's state of a process of this machine; None for other machines."""
    if sign.host != socket.gethostname():
        return None
    status = _read(Path(f"/proc/{sign.process}/status"))
    if status is None:
        return "it is gone"
    letter = next((line.split()[1] for line in status.splitlines() if line.startswith("State:")), "")
    return _STATES.get(letter, "it does not let Python run")


def _lives(before: Sign | None, now: Sign | None) -> bool:
    return now is not None and (before is None or now.beat != before.beat)


def _create(path: Path, content: str = "") -> bool:
    """Makes a file; False where it is there already."""
    try:
        with path.open("x") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
