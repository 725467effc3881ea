"""Position of a process in the grid of pipeline stages and their replicas."""

from dataclasses import dataclass

import torch.distributed as dist

from engine.errors import PlanError


@dataclass(frozen=True)
class Place:
    """Position of a process in the grid of stages and replicas.

    Attributes:
        stages: S.
        replicas: Replicas of each stage, W / S.
        stage: This process' stage.
        replica: This process' replica of the stage.
        data_group: The replicas of this stage.
        pipe_group: The stages of this replica, first to last.
        host_group: The same, for tensors of the hosts.
    """

    stages: int
    replicas: int
    stage: int
    replica: int
    data_group: dist.ProcessGroup
    pipe_group: dist.ProcessGroup
    host_group: dist.ProcessGroup

    @property
    def is_last(self) -> bool:
        """Whether losses are computed here."""
        return self.stage == self.stages - 1


_PLACES: dict[int, Place] = {}


def place_in_pipeline(stages: int) -> Place:
    """This process' position and its groups, which are created once. Called by every process of the run.

    Raises:
        PlanError: The number of processes is no multiple of the stages.
    """
    if stages not in _PLACES:
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % stages != 0:
            raise PlanError(
                [
                    f"parallel.pipeline_stages: got {stages} for {world} processes; allowed is a divisor of their "
                    "number; change it or launch.processes"
                ]
            )
        replicas = world // stages
        data = [dist.new_group(list(range(s * replicas, (s + 1) * replicas))) for s in range(stages)]
        lines = [[s * replicas + r for s in range(stages)] for r in range(replicas)]
        pipe = [dist.new_group(line) for line in lines]
        hosts = [dist.new_group(line, backend="gloo") for line in lines]
        stage, replica = divmod(rank, replicas)
        _PLACES[stages] = Place(stages, replicas, stage, replica, data[stage], pipe[replica], hosts[replica])
    return _PLACES[stages]
