"""Volumes of collectives, against rings and sums worked out by hand."""

from dataclasses import replace

import pytest

from engine.estimate.hardware import HardwareConfig
from engine.estimate.traffic import Cluster, Group, Transfer, all_gather, all_reduce, all_to_all, reduce_scatter


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


def test_gathers_and_scatters_may_have_rates_of_their_own(machine: HardwareConfig) -> None:
    link = replace(machine.within_node, gather_share=0.5, scatter_share=0.25)
    uneven, group = replace(machine, within_node=link), Group(4, 4)
    ring = 3 / 4 * 40e9 / 10e9
    assert all_gather(40e9, group).seconds(uneven) == pytest.approx(2 * ring)
    assert reduce_scatter(40e9, group).seconds(uneven) == pytest.approx(4 * ring)
    assert all_reduce(40e9, group).seconds(uneven) == pytest.approx(2 * ring)
    twice = Transfer() + all_gather(40e9, group) * 2.0
    assert twice.seconds(uneven) == pytest.approx(4 * ring)
