"""Splits the banks of experts over the processes of expert-parallel groups, and tells DeepSpeed about it.

With W processes and expert-parallel size P, processes 0 .. P - 1 together hold one copy of every bank, processes
P .. 2 P - 1 the next one. A process exchanges rows with the others of its copy, and is a replica of the processes that
hold the same experts in other copies. In a pipeline the W / S processes of each pipeline stage form such groups.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from engine.errors import PlanError
from engine.processes.collectives import ProcessGroupExchange
from moe.experts.bank import ExpertBank
from moe.sparse import SparseFeedForward
from omnivl.chain.chain import Chain


class ExpertParallel:
    """The expert-parallel groups of a run, over which it splits banks of experts.

    Attributes:
        size: P.
        group_name: What DeepSpeed calls the groups.
        group: The processes that together hold one copy of every bank; None where no bank is split.
        replicas: The processes of a pipeline stage that hold the same experts; None where no bank is split.
        copies: Copies of every bank among the processes of a pipeline stage.
    """

    def __init__(self, size: int, *, stages: int = 1) -> None:
        """Makes the groups; they exist once in a run. Called by every process; DeepSpeed has to be initialised.

        Args:
            size: P; 1 splits nothing.
            stages: S, number of pipeline stages; 1 without a pipeline.

        Raises:
            PlanError: The number of processes is no multiple of the size.
        """
        self.size, self.group_name = size, f"ep_size_{size}"
        self.group: dist.ProcessGroup | None = None
        self.replicas: dist.ProcessGroup | None = None
        processes = dist.get_world_size() // stages
        self.copies = processes // size
        if size == 1:
            return
        if processes % size != 0:
            allowed = "allowed is a divisor of their number; change it or launch.processes"
            raise PlanError([f"{self._field} for {processes} processes; {allowed}"])
        self.group, self.replicas = _groups(self.group_name, size, stages)

    def cut(self, part: nn.Module) -> None:
        """Splits every bank of a chain, or of a layer of it, that is not split yet. Called by every process.

        Args:
            part: On its device, with equal experts on all processes where it is not split yet.

        Raises:
            PlanError: The number of experts is no multiple of the size.
        """
        if self.group is None:
            return
        exchange = ProcessGroupExchange(self.group)
        for _, bank in expert_banks(part):
            if bank.exchange is not None:
                continue
            if bank.num_experts % self.size != 0:
                allowed = "allowed is a divisor of their number; change one of them"
                raise PlanError([f"{self._field} for {bank.num_experts} experts; {allowed}"])
            for parameter in bank.parameters():
                self.mark(parameter)
            bank.cut(exchange)

    def parameters(self, chain: Chain) -> frozenset[str]:
        """Names of the parameters that are split; empty where none are.

        Raises:
            PlanError: There are no sparse experts to split.
        """
        if self.group is None:
            return frozenset()
        names = [f"{name}.{inner}" for name, bank in expert_banks(chain) for inner, _ in bank.named_parameters()]
        if not names:
            raise PlanError(
                [f"{self._field} for a model without sparse experts; allowed is 1; change it, or model.ffn"]
            )
        return frozenset(names)

    @property
    def _field(self) -> str:
        return f"parallel.expert_parallel_size: got {self.size}"

    def mark(self, parameter: Any) -> None:
        """Sets the attributes by which DeepSpeed knows a parameter of experts that differ between processes."""
        # ZeRO 0 to 2, and the gradient norm: gradients are not summed over all processes.
        parameter.allreduce, parameter.group_name = False, self.group_name
        # ZeRO-3: partitioned over the processes that hold the same experts. Without the last attribute it would be
        # partitioned over all processes, which mixes different experts and raises no error.
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = self.group_name
        parameter.ds_zero_partition_process_group = self.replicas

    def sign(self) -> nn.Module | None:
        """A module without parameters by which ZeRO 0 to 2 recognise a model with experts; None if none are split."""
        if self.group is None:
            return None
        from deepspeed.moe.layer import MoE

        class ExpertsAreCut(MoE):  # type: ignore[misc]
            """DeepSpeed looks for modules of its own class ``MoE`` and reads these three attributes."""

            def __init__(self, size: int, group_name: str) -> None:
                nn.Module.__init__(self)
                self.num_experts, self.ep_size, self.expert_group_name = size, size, group_name

            def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
                """Makes no groups: they exist already."""

        return ExpertsAreCut(self.size, self.group_name)


def expert_banks(part: nn.Module) -> Iterator[tuple[str, ExpertBank]]:
    """The banks of sparse experts of a chain, or of a layer of it, by name."""
    for name, module in part.named_modules():
        if isinstance(module, SparseFeedForward):
            yield f"{name}.experts", module.experts


def _groups(name: str, size: int, stages: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """DeepSpeed's groups of this process: with those that hold one copy, and with those that hold the same experts."""
    from deepspeed.utils import groups

    stage = dist.get_world_size() // stages
    first = dist.get_rank() // stage * stage
    same = range(first + dist.get_rank() % size, first + stage, size)
    copies = groups._EXPERT_DATA_PARALLEL_GROUP_RANKS
    if copies.get(name) != same:
        # DeepSpeed knows groups by their size only, and would reuse those of an earlier host with other stages.
        parts, part_ranks = groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS
        for table in (copies, groups._EXPERT_DATA_PARALLEL_GROUP, parts, part_ranks):
            table.pop(name, None)
        groups._create_expert_and_data_parallel(size, pp_size=stages)
    assert copies[name] == same, f"this process holds the same experts as {list(copies[name])}, not {list(same)}"
    return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
