"""Volumes of collectives, against rings and sums worked out by hand."""

import pytest

from engine.estimate.hardware import HardwareConfig
from engine.estimate.traffic import Cluster, Group, all_gather, all_reduce, all_to_all


@pytest.mark.parametrize(("size", "local"), [(8, 8), (32, 8), (6, 1), (1, 1)])
def test_what_a_process_sends_is_that_of_a_ring(size: int, local: int) -> None:
    group = Group(size, local)
    reduced, gathered = all_reduce(1000.0, group), all_gather(1000.0, group)
    assert reduced.within + reduced.between == pytest.approx(2 * (size - 1) / size * 1000)
    assert gathered.within + gathered.between == pytest.approx((size - 1) / size * 1000)
    if size == local:
        assert reduced.between == 0


def test_experts_get_equal_shares() -> None:
    traded = all_to_all(1600.0, Group(16, 4))  # 100 bytes to each: 3 of the own node, 12 of others
    assert (traded.within, traded.between) == (300.0, 1200.0)


def test_groups_and_seconds(machine: HardwareConfig) -> None:
    cluster = Cluster(machine, 4, 4)
    assert cluster.group(16) == Group(16, 4) and cluster.group(2) == Group(2, 2)
    assert cluster.group(8, stride=2) == Group(8, 2)  # every second process: two of a node
    assert cluster.is_within(0, 3) and not cluster.is_within(3, 4)
    # 16 GB over 4 nodes of 4: 2 * 16 * 3/4 GB within at 10 GB/s, 2 * 16 * 3/16 GB between at 1 GB/s
    assert all_reduce(16e9, cluster.group(16)).seconds(machine) == pytest.approx(2.4 + 6.0)
