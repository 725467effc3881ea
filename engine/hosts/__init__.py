"""Hosts run the chain: ``plain`` in bare PyTorch, ``zero`` and ``pipeline`` under DeepSpeed.

``create_host`` is the one place that knows them all. DeepSpeed is imported only where it is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import nn

from engine.errors import PlanError
from engine.hosts.base import Host, WeightsReport
from engine.hosts.pipeline.division import Division
from engine.hosts.pipeline.place import place_in_pipeline
from engine.hosts.plain import PlainHost
from engine.hosts.zero.experts import expert_banks
from engine.plan.parallel import CommunicationDtype, ParallelConfig
from engine.processes.process_group import local_processes
from engine.processes.ranks import world_size
from engine.step.optimizer import OptimizerConfig, Origins
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Objective

__all__ = [
    "Host",
    "PlainHost",
    "WeightsReport",
    "create_host",
    "expert_parallel_size",
    "layer_sharder",
    "needs_process_group",
    "replica_group",
]


def needs_process_group(parallel: ParallelConfig) -> bool:
    """Whether the host needs a process group even for one process; passed to ``join_process_group`` as ``always``."""
    return parallel.host != "plain"


def replica_group(parallel: ParallelConfig) -> dist.ProcessGroup | None:
    """The processes over which the chain's gather joins samples; None: all. Called by every process."""
    if parallel.host != "pipeline":
        return None
    return place_in_pipeline(parallel.pipeline_stages).data_group


def expert_parallel_size(parallel: ParallelConfig, part: nn.Module) -> int:
    """Processes over which every bank of sparse experts of a chain, or of a layer of it, is split in this run."""
    banks = [bank.num_experts for _, bank in expert_banks(part)]
    return parallel.experts_over(banks, local_processes(), world_size())


def layer_sharder(parallel: ParallelConfig, device: torch.device) -> Callable[[ChainLayer], None] | None:
    """Makes the function that shards each layer of a chain while the chain is being built, for ``create_host``.

    Args:
        parallel: Which host, and how it shards.
        device: Where the chain is to run.

    Returns:
        A function that every process calls with each layer in turn; None for hosts that take the chain whole.
    """
    if parallel.host != "zero" or parallel.zero_stage < 3:
        return None
    from engine.hosts.zero.build import ZeroBuild

    build = ZeroBuild(lambda layer: expert_parallel_size(parallel, layer), parallel.offloading, device)
    return build.shard


def create_host(
    parallel: ParallelConfig,
    chain: Chain,
    optimizer: OptimizerConfig,
    objectives: Sequence[Objective],
    *,
    total_steps: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int = 1,
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
    origins: Origins | None = None,
    division: Division | None = None,
    contrasts_step: bool = False,
) -> Host:
    """Builds the host that a plan asks for.

    Args:
        parallel: Which host, and how it shards.
        chain: Built with a gather over ``replica_group(parallel)`` and ``parallel.precision``, on the CPU; with ZeRO-3
            by ``layer_sharder(parallel)``, or whole.
        optimizer: AdamW or Muon, schedule, clipping.
        objectives: The stage's objectives; they decide the layout of each micro-batch.
        total_steps: Optimizer steps of the stage, for the schedule.
        micro_batch_size: Samples of a micro-batch on one replica.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        device: Where the chain runs, from ``join_process_group``; the CPU where it is not given.
        group: Replicas of the plain host; None is the default process group. The zero host always takes the default.
        origins: Where starting values of parameters come from; None: all are random.
        division: Passes and layers of each pipeline stage (``engine.hosts.pipeline.cut``).
        contrasts_step: Whether objectives that compare embeddings compare those of all micro-batches of a step.

    Raises:
        PlanError: There is no such host.
    """
    layout = partial(plan_layout, objectives)
    optimizer = replace(optimizer, muon=optimizer.muon.settled(parallel.precision))
    common: _Common = {
        "total_steps": total_steps,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "device": device,
        "origins": origins,
        "communication_dtype": parallel.communication_dtype,
        "contrasts_step": contrasts_step,
    }
    if parallel.host == "plain":
        return PlainHost(chain, optimizer, layout, group=group, **common)
    sharded: _Sharded = {
        **common,
        "micro_batch_size": micro_batch_size,
        "expert_parallel_size": expert_parallel_size(parallel, chain),
    }
    if parallel.host == "zero":
        from engine.hosts.zero.host import ZeroHost

        zero_stage, offload = parallel.zero_stage, parallel.offloading
        return ZeroHost(chain, optimizer, layout, zero_stage=zero_stage, offload=offload, **sharded)
    if parallel.host == "pipeline":
        from engine.hosts.pipeline.host import PipelineHost

        assert parallel.zero_stage in (0, 1), "the plan's rules allow no other"
        assert division is not None, "a pipeline's stages are to be chosen first"
        return PipelineHost(chain, optimizer, layout, division=division, zero_stage=parallel.zero_stage, **sharded)
    raise PlanError(
        [f"parallel.host: got {parallel.host!r}; allowed are 'plain', 'zero', 'pipeline'; change it to one of them"]
    )


class _Common(TypedDict):
    """Arguments of every host in addition to the chain, the optimizer and the layout of a micro-batch."""

    total_steps: int
    gradient_accumulation_steps: int
    device: torch.device | None
    origins: Origins | None
    communication_dtype: CommunicationDtype
    contrasts_step: bool


class _Sharded(_Common):
    """Further arguments of the hosts under DeepSpeed."""

    micro_batch_size: int
    expert_parallel_size: int
