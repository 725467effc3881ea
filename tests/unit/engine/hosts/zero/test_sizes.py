"""Bucket sizes by hand, for layers that train 6 M, 100 M and no parameters."""

import torch
from torch import nn

from engine.hosts.zero.sizes import ZeroSizes

LEAST = 4_194_304


def layer(trained: int, resting: int = 0) -> nn.Module:
    with torch.device("meta"):
        made = nn.Module()
        made.trained = nn.Parameter(torch.empty(trained))
        made.resting = nn.Parameter(torch.empty(resting), requires_grad=False)
    return made


def test_one_layer_at_a_time() -> None:
    # Twins are gathered with what they follow, but neither reduced nor stepped.
    sizes = ZeroSizes.of([layer(6_000_001, 6_000_000), layer(5_000_000, 8_000_000), layer(10)])
    assert sizes == ZeroSizes(bucket=6_000_002, prefetch=13_000_000, live=39_000_000, reuse=13_000_000)


def test_small_layers_go_together() -> None:
    assert ZeroSizes.of([layer(3_000_000)] * 5) == ZeroSizes(LEAST, LEAST, 3 * LEAST, LEAST)
    # A bucket is never larger than all that is trained.
    assert ZeroSizes.of([layer(1000), layer(7)]).bucket == 1008


def test_large_layers_are_reduced_and_gathered_ahead_in_parts() -> None:
    sizes = ZeroSizes.of([layer(100_000_000), layer(6_000_000)])
    assert sizes == ZeroSizes(50_000_000, 50_000_000, live=250_000_000, reuse=100_000_000)


def test_bytes_of_a_process() -> None:
    layers = [layer(6_000_001, 6_000_000), layer(5_000_000, 8_000_000)]
    assert ZeroSizes.share_bytes(layers, 4) == (16 * 11_000_001 + 4 * 14_000_000) // 4
    assert ZeroSizes.of(layers).transient_bytes() == 4 * (3 * 13_000_000 + 6_000_002)


def test_bytes_of_a_process_with_muon() -> None:
    layers = [layer(6_000_001, 6_000_000), layer(5_000_000, 8_000_000)]
    moved = {id(one) for one in (layers[1].trained, layers[0].resting)}  # what is not trained has no moments
    assert ZeroSizes.share_bytes(layers, 4, moved) == (16 * 6_000_001 + 12 * 5_000_000 + 4 * 14_000_000) // 4
    sizes = ZeroSizes(bucket=10, prefetch=10, live=30, reuse=10)
    assert sizes.transient_bytes(7) == 4 * (10 + 30), "whole layers are more than a step holds"
    assert sizes.transient_bytes(9) == 4 * (10 + 4 * 9)
    assert sizes.transient_bytes(100) == 4 * (10 + 4 * 10), "a bucket is stepped at a time"


def test_what_a_stage_reads_of_it() -> None:
    sizes = ZeroSizes(8, 4, 12, 6)
    assert sizes.as_config(2) == {"reduce_bucket_size": 8, "allgather_bucket_size": 8}
    assert sizes.as_config(3) == {
        "reduce_bucket_size": 8,
        "sub_group_size": 8,
        "stage3_prefetch_bucket_size": 4,
        "stage3_max_live_parameters": 12,
        "stage3_max_reuse_distance": 6,
    }
