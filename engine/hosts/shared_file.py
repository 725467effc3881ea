"""Where each process writes in the safetensors file that the processes of its machine write together.

A file begins with the length of its header. The parts of the header follow, one of each process in the order of ranks,
then the data of each process in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LENGTH = 8
"""Bytes that say the length of a header; parts of headers and data are padded to multiples of as many."""
_LONGEST = 100_000_000
"""Bytes of the longest header that safetensors reads."""


@dataclass(frozen=True)
class Part:
    """What the other processes of a machine have to know of a process' part of their file.

    Attributes:
        machine: On which it runs.
        head: Bytes of its part of the header.
        data: Bytes of its data.
    """

    machine: str
    head: int
    data: int


@dataclass(frozen=True)
class Place:
    """Where a process writes.

    Attributes:
        shards: Number of the file of each process.
        shard: Number of its own.
        head: Byte at which its part of the header begins.
        header_end: Byte at which the header ends and the data of all its processes begin.
        data: Byte at which its own data begin.
        end: Size of the file.
        is_last: Whether its part of the header is the last one.
    """

    shards: Sequence[int]
    shard: int
    head: int
    header_end: int
    data: int
    end: int
    is_last: bool

    @property
    def is_first(self) -> bool:
        """Whether its part of the header is the first one."""
        return self.head == LENGTH


def place_among(parts: Sequence[Part], process: int) -> Place:
    """The place of a process among all of a run: one file for each machine, or more where a header would be too long.

    Args:
        parts: Of each process.
        process: Which one.
    """
    shards: list[int] = []
    newest: dict[str, tuple[int, int]] = {}  # number of a machine's newest file, bytes of its header
    for part in parts:
        shard, filled = newest.get(part.machine, (-1, _LONGEST))
        if filled + part.head > _LONGEST:
            shard, filled = max(shards, default=-1) + 1, 0
        newest[part.machine] = shard, filled + part.head
        shards.append(shard)
    here = [number for number, shard in enumerate(shards) if shard == shards[process]]
    before, behind = ([parts[number] for number in here if (number < process) == side] for side in (True, False))
    head = LENGTH + sum(part.head for part in before)
    header_end = head + sum(part.head for part in behind)
    data = header_end + sum(part.data for part in before)
    end = data + sum(part.data for part in behind)
    return Place(shards, shards[process], head, header_end, data, end, is_last=process == here[-1])
