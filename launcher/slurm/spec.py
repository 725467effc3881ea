"""The description of a job: written by ``omnivl submit``, read by the job. No shell interprets any of it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.disk.run_folder import write_whole
from launcher.slurm.profile import ClusterProfile, NodeCheckConfig


@dataclass(frozen=True)
class JobRun:
    """One run of a job; a job array has several.

    Attributes:
        plan: The resolved plan, as it was when it was submitted.
        folder: The run's folder.
    """

    plan: str
    folder: str


@dataclass(frozen=True)
class JobSpec:
    """The description of a job.

    Attributes:
        tasks: Its runs, by the array's index.
        nodes: Of each task.
        processes_per_node: Ranks on each of them.
        gpus_per_node: GPUs that each node must have; 0 for CPUs.
        profile: The cluster.
        stage: Run this stage only.
        fresh: Delete an earlier run, at the job's first start.
        amend: Take over what the plan changes in a run that has begun.
    """

    tasks: tuple[JobRun, ...]
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    profile: ClusterProfile
    stage: str | None = None
    fresh: bool = False
    amend: bool = False

    def write(self, file: Path) -> None:
        """Writes it down."""
        write_whole(file, json.dumps(asdict(self), indent=1) + "\n")


def read_spec(file: Path) -> JobSpec:
    """Reads what ``JobSpec.write`` wrote."""
    fields = json.loads(file.read_bytes())
    profile = fields["profile"]
    profile |= {"check": NodeCheckConfig(**profile["check"]), "setup": tuple(profile["setup"])}
    fields |= {"tasks": tuple(JobRun(**task) for task in fields["tasks"]), "profile": ClusterProfile(**profile)}
    return JobSpec(**fields)
