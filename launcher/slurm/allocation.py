"""The allocation of a running job, as Slurm's variables describe it."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.processes.variables import number_in
from launcher.start.discovery import free_port
from launcher.start.nodes import expand_nodes, rendezvous_port


@dataclass(frozen=True)
class Allocation:
    """Where a job runs.

    Attributes:
        job: Its number; every task of an array has its own.
        restart: How often it was started before.
        nodes: Their names.
        task: The array's index; 0 outside of one.
        port: Rendezvous port of its processes on the first node, free when the job began.
    """

    job: int
    restart: int
    nodes: tuple[str, ...]
    task: int
    port: int

    @property
    def label(self) -> str:
        """Name of this start of this job."""
        return f"{self.job}.{self.restart}"


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Reads the variables of a batch job. Called on its first node.

    Raises:
        LaunchError: One of them is no number.
    """
    job = number_in(environment, "SLURM_JOB_ID")
    return Allocation(
        job,
        number_in(environment, "SLURM_RESTART_COUNT", absent=0),
        tuple(expand_nodes(environment["SLURM_JOB_NODELIST"])),
        number_in(environment, "SLURM_ARRAY_TASK_ID", absent=0),
        free_port(rendezvous_port(job)),
    )
