"""Parses Slurm's lists of nodes and tasks, and chooses the rendezvous port of a job."""

import re
from collections.abc import Iterator

_GROUP = re.compile(r"[^,\[\]]*(?:\[[^\]]*\][^,\[\]]*)*")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_FIRST_PORT, _PORTS = 12000, 18000
"""Below 32768, the first port that Linux uses for outgoing connections."""


def expand_nodes(text: str) -> list[str]:
    """The names in ``gpu[1-3,07],login-a``: ``gpu1``, ``gpu2``, ``gpu3``, ``gpu07``, ``login-a``.

    Raises:
        ValueError: A list that Slurm does not write.
    """
    names: list[str] = []
    position = 0
    while position < len(text):
        match = _GROUP.match(text, position)
        if match is None or match.end() == position or text[match.end() : match.end() + 1] not in ("", ","):
            raise ValueError(f"not a list of nodes: {text!r}")
        names += _expand(match.group())
        position = match.end() + 1
    return names


def tasks_on_node(text: str, node: int) -> int:
    """Tasks on the node of that index, from ``4(x2),3``: 4 on nodes 0 and 1, 3 on node 2.

    Raises:
        ValueError: There is no such node in the list.
    """
    index = 0
    for count, repeated in _TASKS.findall(text):
        index += int(repeated or 1)
        if node < index:
            return int(count)
    raise ValueError(f"no node {node} in {text!r}")


def rendezvous_port(job: int, step: int = 0) -> int:
    """A port computed from the job's and the step's number, so that two jobs on a node have different ones."""
    return _FIRST_PORT + (11 * job + step) % _PORTS


def _expand(group: str) -> Iterator[str]:
    before, bracket, rest = group.partition("[")
    if not bracket:
        yield group
        return
    inner, _, after = rest.partition("]")
    for part in inner.split(","):
        low, dash, high = part.partition("-")
        for number in range(int(low), int(high if dash else low) + 1):
            for tail in _expand(after):
                yield f"{before}{number:0{len(low)}d}{tail}"
