"""Settings of all jobs of a cluster, in a small YAML file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from engine.plan.yaml import read_yaml
from moe.ranges import Range
from omnivl.data.plain_files import read_small
from omnivl.errors import UserError

Launcher = Literal["srun", "deepspeed"]


@dataclass(frozen=True)
class NodeCheckConfig:
    """Requirements that every node has to meet before training, and again after a failure.

    Attributes:
        enabled: Whether nodes are checked.
        timeout_seconds: For the whole check; a node that has not answered by then is bad.
        free_gib: Space that has to be free in the run's folder.
        free_memory_gib: Space that has to be free in the node's ``/dev/shm``, through which data workers hand batches.
        clock_seconds: Largest difference of the clocks of two nodes.
    """

    enabled: bool = True
    timeout_seconds: Annotated[int, Range(1)] = 180
    free_gib: Annotated[float, Range(0)] = 5.0
    free_memory_gib: Annotated[float, Range(0)] = 0.1
    clock_seconds: Annotated[float, Range(above=0)] = 5.0


@dataclass(frozen=True)
class ClusterProfile:
    """A cluster.

    Attributes:
        sbatch: Options of ``sbatch`` without their dashes; ``true`` for one without a value.
        setup: Lines of bash before anything is started, such as ``module load cuda``. Run as they stand.
        environment: Variables of the job.
        launcher: What starts the ranks: ``srun`` each of them, or ``deepspeed`` those of its node.
        interface: Network interface of NCCL and gloo, such as ``ib0``; null lets NCCL choose, and has gloo take the one
            that leads to the other nodes.
        gpus_per_node: GPUs per node of a job that does not set it.
        grace_seconds: How long before the time limit a job is told to save and to be requeued.
        restarts_without_progress: How often a job may be restarted without having saved a further step.
        check: Requirements that every node has to meet.
    """

    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    launcher: Launcher = "srun"
    interface: str | None = None
    gpus_per_node: Annotated[int, Range(0)] | None = None
    grace_seconds: Annotated[int, Range(1)] = 120
    restarts_without_progress: Annotated[int, Range(0)] = 3
    check: NodeCheckConfig = field(default_factory=NodeCheckConfig)


def load_profile(file: Path | None) -> ClusterProfile:
    """Reads a cluster's file; None gives the defaults.

    Raises:
        PlanError: Names everything that is wrong in it.
        UserError: There is no such file.
    """
    from engine.plan.parse import (
        parse_as,
    )  # takes seconds, and a job that only reads its own profile does not need it

    if file is None:
        return ClusterProfile()
    try:
        text = read_small(file).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise UserError(f"--cluster: got {file}, which cannot be read ({reason}); name a YAML file") from error
    return parse_as(ClusterProfile, read_yaml(text, str(file)))
