"""Bytes that collectives send over the links within and between nodes.

Collectives between nodes are assumed to be hierarchical, as NCCL's are if every GPU has a network port: all bytes go
through the links within a node, the share of each process through those between nodes. The sum is that of a ring over
all processes.

Letters: V bytes, n processes of a group, g of them on a node, m nodes.
"""

import math
from dataclasses import dataclass, replace

from engine.estimate.hardware import CollectiveKind, HardwareConfig


@dataclass(frozen=True)
class Cluster:
    """Equal nodes.

    Attributes:
        hardware: What they are.
        nodes: How many.
        per_node: Processes on each.
    """

    hardware: HardwareConfig
    nodes: int
    per_node: int

    @property
    def processes(self) -> int:
        """In all."""
        return self.nodes * self.per_node

    def group(self, size: int, stride: int = 1) -> "Group":
        """So many processes, each ``stride`` behind the one before."""
        return Group(size, max(1, min(size, self.per_node // stride)))

    def is_within(self, first: int, second: int) -> bool:
        """Whether two processes are on one node."""
        return first // self.per_node == second // self.per_node


@dataclass(frozen=True)
class Group:
    """Processes that take part in a collective.

    Attributes:
        size: n.
        local: g.
    """

    size: int
    local: int

    @property
    def nodes(self) -> int:
        """How many they are on: m."""
        return -(-self.size // self.local)


@dataclass(frozen=True)
class Transfer:
    """What one process sends.

    Attributes:
        within: Bytes to others of its node.
        between: Bytes to other nodes.
        within_messages: Messages within the node, one after the other.
        between_messages: Messages between nodes, one after the other.
        kind: Kind of collective; only transfers of one kind are added up.
    """

    within: float = 0.0
    between: float = 0.0
    within_messages: float = 0.0
    between_messages: float = 0.0
    kind: CollectiveKind = "other"

    def seconds(self, hardware: HardwareConfig) -> float:
        """How long it takes."""
        inner = hardware.within_node.seconds(self.within, self.within_messages, self.kind)
        return inner + hardware.between_nodes.seconds(self.between, self.between_messages, self.kind)

    def __mul__(self, times: float) -> "Transfer":
        within, between, within_messages, between_messages = (times * value for value in self._amounts)
        return Transfer(within, between, within_messages, between_messages, self.kind)

    def __add__(self, other: "Transfer") -> "Transfer":
        within, between, within_messages, between_messages = (
            a + b for a, b in zip(self._amounts, other._amounts, strict=True)
        )
        kind = self.kind if any(self._amounts) else other.kind
        return Transfer(within, between, within_messages, between_messages, kind)

    @property
    def _amounts(self) -> tuple[float, ...]:
        return self.within, self.between, self.within_messages, self.between_messages


def all_gather(total: float, group: Group) -> Transfer:
    """Each process has V / n and gets V: it sends V (n - 1) / n."""
    g, m = group.local, group.nodes
    return Transfer(total * (g - 1) / g, total * (m - 1) / (m * g), g - 1, _rounds(m), "gather")


def reduce_scatter(total: float, group: Group) -> Transfer:
    """Each process has V and gets the sum of its V / n: the all-gather backwards."""
    return replace(all_gather(total, group), kind="scatter")


def all_reduce(total: float, group: Group) -> Transfer:
    """Reduce-scatter and all-gather: 2 V (n - 1) / n."""
    return replace(all_gather(total, group) * 2.0, kind="other")


def all_to_all(own: float, group: Group) -> Transfer:
    """Each process sends V / n of its V to each other one."""
    n, g = group.size, group.local
    return Transfer(own * (g - 1) / n, own * (n - g) / n, g - 1, n - g)


def send(size: float, *, within: bool) -> Transfer:
    """One process to another."""
    return Transfer(size, 0.0, 1, 0) if within else Transfer(0.0, size, 0, 1)


def _rounds(nodes: int) -> int:
    """Messages that follow one another between nodes: small collectives go along trees."""
    return math.ceil(math.log2(nodes)) if nodes > 1 else 0
