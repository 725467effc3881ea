"""What each process of a run is doing: recorded by the loop, sampled and written to a file by another thread.

The loop records what it begins, at the cost of a tuple. In the watchdog's thread, a ``Pulse`` reads this record and the
main thread's position in the code, and measures for how long neither has changed. A ``Sign`` is the state that one
process writes for the others, into its own file in the run folder.
"""

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from omnivl.data.plain_files import not_through_links

Activity = Literal["starting", "first step", "loading data", "step", "evaluating", "saving", "finishing"]

_LONG: frozenset[Activity] = frozenset({"starting", "first step", "evaluating", "saving", "finishing"})
"""Activities that may take any time as long as the code position changes: compiling, evaluating, writing files."""

_COMPUTING_SHARE = 0.05
"""Share of the time between two signs from which on a thread counts as computing."""

_RECORD_BYTES = 2048
_ROOT = Path(__file__).parents[2]
_OURS = tuple(f"{_ROOT / package}{os.sep}" for package in ("engine", "omnivl", "moe", "launcher"))
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
_DEEPSPEED = f"{os.sep}deepspeed{os.sep}"


class Doing(NamedTuple):
    """What the loop is doing. ``number`` counts the begun activities: it is equal on processes that are in step."""

    number: int
    activity: Activity
    stage: str
    step: int


class Heartbeat:
    """The main thread's record. Reading and replacing a tuple needs no lock."""

    def __init__(self) -> None:
        """Begins with the start of the run."""
        self.doing = Doing(0, "starting", "", 0)

    def begin(self, activity: Activity, stage: str, step: int) -> None:
        """The loop begins something.

        Args:
            activity: What.
            stage: In which stage.
            step: Optimizer steps taken.
        """
        self.doing = Doing(self.doing.number + 1, activity, stage, step)


@dataclass(frozen=True)
class Sign:
    """The state of one process, as it writes it itself.

    Attributes:
        rank: Which.
        host: Its machine.
        process: Its process id there.
        beat: Number of signs so far: if it no longer rises, the process is stopped or has ended.
        number: See ``Doing``.
        activity: What it is doing.
        stage: In which stage.
        step: Optimizer steps taken.
        idle: Seconds without any change.
        waiting: Whether it waits for other processes, inside a collective.
        where: The innermost position in our code.
    """

    rank: int
    host: str
    process: int
    beat: int
    number: int
    activity: str
    stage: str
    step: int
    idle: float
    waiting: bool
    where: str

    def __str__(self) -> str:
        stage = f"stage {self.stage}, " if self.stage else ""
        waiting = ", waiting for other processes" if self.waiting else ""
        return f"{stage}after step {self.step} ({self.activity}), at {self.where}{waiting}"


class Pulse:
    """Makes the signs of this process, one for each call of ``sign``."""

    def __init__(self, heartbeat: Heartbeat, rank: int, period: float) -> None:
        """Watches the main thread.

        Args:
            heartbeat: What it notes.
            rank: Of this process.
            period: Seconds between two calls. Time is counted in calls, so that a run that was suspended as a whole
                has not been idle.
        """
        self._heartbeat, self._rank, self._period = heartbeat, rank, period
        self._main = threading.main_thread().ident or 0
        self._host, self._process = socket.gethostname(), os.getpid()
        self._beat, self._idle = 0, 0.0
        self._seen: tuple[object, ...] = ()
        self._computed = (0.0, 0.0)

    def sign(self) -> Sign:
        """The present state."""
        doing = self._heartbeat.doing
        stacks = sys._current_frames()
        frames = _frames(stacks.get(self._main))
        waiting = any(_is_collective(frame) for frame in frames) or _waits_in_backward(stacks)
        place = tuple((id(frame.f_code), frame.f_lasti) for frame in frames) if doing.activity in _LONG else ()
        seen, computes = (doing.number, place), self._computes(doing.activity)
        moved = seen != self._seen or (doing.activity in _LONG and computes and not waiting)
        self._idle = 0.0 if moved else self._idle + self._period
        self._seen = seen
        self._beat += 1
        return Sign(
            self._rank,
            self._host,
            self._process,
            self._beat,
            *doing,
            idle=self._idle,
            waiting=waiting,
            where=_where(frames)[:200],
        )

    def _computes(self, activity: Activity) -> bool:
        """Whether there was work since the last call, such as hashes within one call into C.

        This is the work of the main thread, or, while it waits for the thread that writes a checkpoint, of the whole
        process.
        """
        main, whole = time.clock_gettime(time.pthread_getcpuclockid(self._main)), time.process_time()
        before, self._computed = self._computed, (main, whole)
        worked = self._computed[activity == "saving"] - before[activity == "saving"]
        return worked > _COMPUTING_SHARE * self._period


def sign_file(folder: Path, rank: int) -> Path:
    """The file of a process' signs."""
    return folder / f"rank-{rank:05d}.json"


def write_sign(folder: Path, sign: Sign) -> None:
    """Overwrites a process' sign in place, in one write: network file systems show a rename later than new content."""
    content = json.dumps(asdict(sign)).encode()[:_RECORD_BYTES].ljust(_RECORD_BYTES)
    descriptor = not_through_links(str(sign_file(folder, sign.rank)), os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)


def read_sign(folder: Path, rank: int) -> Sign | None:
    """A process' last sign; None if there is none, or only a part of one."""
    try:
        return Sign(**json.loads(sign_file(folder, rank).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _frames(innermost: FrameType | None) -> list[FrameType]:
    found: list[FrameType] = []
    while innermost is not None:
        found.append(innermost)
        innermost = innermost.f_back
    return found


def _waits_in_backward(stacks: dict[int, FrameType]) -> bool:
    """Whether a collective runs on a thread that Python did not start: autograd has one for each GPU."""
    started = {one.ident for one in threading.enumerate() if not isinstance(one, threading._DummyThread)}
    return any(
        _is_collective(frame) for thread, stack in stacks.items() if thread not in started for frame in _frames(stack)
    )


def _is_collective(frame: FrameType) -> bool:
    """Whether a frame communicates with other processes: torch's calls, and DeepSpeed's waiting for earlier ones."""
    file = frame.f_code.co_filename
    return _COLLECTIVES in file or (_DEEPSPEED in file and frame.f_code.co_name in ("wait", "synchronize"))


def _where(frames: list[FrameType]) -> str:
    """The innermost frame of our packages, or of all where none is ours."""
    ours = [frame for frame in frames if any(part in frame.f_code.co_filename for part in _OURS)]
    if not frames:
        return "no Python code"
    frame = next(iter(ours), frames[0])
    file = Path(frame.f_code.co_filename)
    shown = file.relative_to(_ROOT) if ours else file
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_name}"
