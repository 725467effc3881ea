"""Which rank failed first, from srun's messages about its tasks and from what the ranks have reported."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.start.nodes import expand_nodes

_ENDED = re.compile(r"srun: error: (?P<node>[^:\s]+): tasks? (?P<tasks>[\d,\[\]-]+): (?P<what>.+)")
_LOST = re.compile(r"srun: error: Node failure on (\S+)")
_CODE = re.compile(r"Exited with exit code (\d+)")
_TOGETHER_SECONDS = 2.0
"""Ranks that end within this time count as ending together: one that failed, and those that fail because of it."""

_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


@dataclass(frozen=True)
class FailedRank:
    """The rank that failed first.

    Attributes:
        rank: Its number; None where only the node is known.
        node: Where it ran.
        code: Its exit code; 128 + n where signal n ended it.
        what: Description by srun.
    """

    rank: int | None
    node: str
    code: int
    what: str


def first_failure(messages: Sequence[tuple[float, str]]) -> FailedRank | None:
    """The task that failed first; None if srun named none.

    When a signal ends a task, others fail because they have lost it: of tasks that end together, the one that was ended
    by a signal failed first.

    Args:
        messages: srun's own lines, each with the seconds at which it came.
    """
    failures = [(when, failure) for when, line in messages if (failure := _parse(line)) is not None]
    if not failures:
        return None
    together = [failure for when, failure in failures if when <= failures[0][0] + _TOGETHER_SECONDS]
    by_signal = [failure for failure in together if failure.code > 128 and _CODE.match(failure.what) is None]
    killed = [failure for failure in by_signal if failure.code != 128 + signal.SIGTERM]  # srun ends the others by TERM
    return (killed or together)[0]


def lost_nodes(messages: Sequence[tuple[float, str]]) -> list[str]:
    """Nodes that Slurm has lost during the step: they count as the first failure, whatever others report later.

    Args:
        messages: See ``first_failure``.
    """
    found = [match[1] for _, line in messages if (match := _LOST.search(line)) is not None]
    return [node for text in found for node in expand_nodes(text)]


def exit_code(code: int) -> int:
    """An exit code between 0 and 255, with 128 + n for an end by signal n.

    deepspeed's launcher passes Popen's negative numbers on, of which the system keeps the lowest byte.
    """
    code %= 256
    return 128 + (256 - code) if code > 192 else code


def describe_code(code: int) -> str:
    """Parses an exit code in srun's message."""
    return f"Exited with exit code {code}" if code <= 128 else signal.strsignal(code - 128) or f"signal {code - 128}"


def _parse(line: str) -> FailedRank | None:
    match = _ENDED.search(line)
    if match is None:
        return None
    what = match["what"].strip()
    first = int(expand_nodes(f"[{match['tasks'].strip('[]')}]")[0])
    if (code := _CODE.match(what)) is not None:
        return FailedRank(first, match["node"], exit_code(int(code[1])), what)
    number = next((number for name, number in _SIGNALS.items() if name and what.startswith(name)), signal.SIGKILL)
    return FailedRank(first, match["node"], 128 + number, what)
