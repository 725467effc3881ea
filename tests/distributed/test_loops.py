"""What replaces DeepSpeed's loops over ranks gives the same bits."""

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.hosts.zero.loops import gather_without_loops, reduce_scatter_coalesced

pytestmark = pytest.mark.distributed

SIZES = ((6,), (7, 3), (1,), (4, 4), (2,))
"""With and without padding; fewer elements than replicas, too."""


def prepare() -> None:
    """As ``import_deepspeed`` does, without the replacements."""
    import deepspeed

    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def reduced() -> list[bool]:
    """Worker: compares shares of averages."""
    prepare()
    usual = importlib.import_module("deepspeed.runtime.comm.coalesced_collectives").reduce_scatter_coalesced
    random = torch.Generator().manual_seed(dist.get_rank())
    given = [torch.randn(size, generator=random) for size in SIZES]
    equal = []
    for tensors in ([given[0]], [given[1]], given):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = usual([tensor.to(dtype, copy=True) for tensor in tensors])
            got = reduce_scatter_coalesced([tensor.to(dtype, copy=True) for tensor in tensors])
            equal += [torch.equal(one, other) for one, other in zip(got, wanted, strict=True)]
    return equal


def gathered() -> list[bool]:
    """Worker: shards, gathers, compares with what was there."""
    import deepspeed

    prepare()
    torch.manual_seed(0)
    whole = [torch.randn(size) for size in SIZES]
    module = torch.nn.ParameterList(torch.nn.Parameter(one.clone()) for one in whole)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.float32)
    parameters: list[Any] = list(module)
    gather_without_loops(parameters)
    parameters[1].comm_dtype = torch.bfloat16
    whole[1] = whole[1].to(torch.bfloat16).float()
    equal = [parameter.numel() == 0 for parameter in parameters]
    handle = parameters[0].all_gather_coalesced(parameters)
    assert {type(one).__name__ for one in handle.handles} == {"_Gathered"}
    assert len(handle.handles) == 2  # one for each dtype
    handle.wait()
    return equal + [torch.equal(one, other) for one, other in zip(parameters, whole, strict=True)]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("worker", [reduced, gathered])
def test_the_bits_are_those_of_deepspeed(run_distributed: Any, worker: Any, processes: int) -> None:
    for equal in run_distributed(worker, processes=processes):
        assert len(equal) >= 2 * len(SIZES)
        assert all(equal), equal
