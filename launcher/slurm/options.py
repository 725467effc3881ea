"""Options of the commands that submit jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from engine.plan.consent import Reach, refuse_foreign
from launcher.slurm.profile import ClusterProfile, load_profile
from launcher.slurm.script import OptionValue, check_options
from launcher.slurm.submission import Request
from omnivl.errors import UserError

Nodes = Annotated[int, typer.Option(min=1, help="Nodes of the job.")]
GpusPerNode = Annotated[
    int | None, typer.Option(min=0, help="GPUs on each node, and as many ranks; 0 trains on CPUs.", show_default=False)
]
ProcessesPerNode = Annotated[
    int | None, typer.Option(min=1, help="Ranks on each node, where they are not as many as GPUs.", show_default=False)
]
Partition = Annotated[str | None, typer.Option(help="sbatch's --partition.", show_default=False)]
TimeLimit = Annotated[str | None, typer.Option("--time", help="sbatch's --time, e.g. 24:00:00.", show_default=False)]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(help="Any other option of sbatch, e.g. account=vision or exclusive.", show_default=False),
]
Cluster = Annotated[
    Path | None,
    typer.Option(envvar="OMNIVL_CLUSTER", help="The cluster's file; see configs/clusters/.", show_default=False),
]
Launcher = Annotated[str | None, typer.Option(help="srun or deepspeed; the cluster's by default.", show_default=False)]


def request(
    nodes: int,
    gpus_per_node: int | None,
    processes_per_node: int | None,
    partition: str | None,
    time_limit: str | None,
    sbatch: Sequence[str] | None,
    cluster: Path | None,
    launcher: str | None,
    *,
    allow_commands: bool,
) -> Request:
    """The request of these options.

    Raises:
        UserError: An option that the job's script sets itself, or an unknown launcher.
        PlanError: Mistakes in the cluster's file, or it is another user's, who may not say what a job runs.
    """
    profile = _with_launcher(load_profile(cluster), launcher)
    if cluster is not None:
        refuse_foreign(_commands(profile), [cluster], allowed=allow_commands)
    check_options(profile.sbatch, f"{cluster}: sbatch")
    options: dict[str, OptionValue] = {}
    for text in sbatch or ():
        name, equals, value = text.removeprefix("--").partition("=")
        options[name] = value if equals else True
    options |= {} if partition is None else {"partition": partition}
    options |= {} if time_limit is None else {"time": time_limit}
    check_options(options, "--sbatch")
    gpus = profile.gpus_per_node or 0 if gpus_per_node is None else gpus_per_node
    return Request(profile, nodes, gpus, processes_per_node, options)


def _commands(profile: ClusterProfile) -> list[Reach]:
    """What a cluster's file has a job do: its lines of bash, and the variables and options by which commands change."""
    lines = [Reach(f"setup.{number}", line, "is run by bash") for number, line in enumerate(profile.setup)]
    variables = [
        Reach(f"environment.{name}", text, "is a variable of the job") for name, text in profile.environment.items()
    ]
    options = [Reach(f"sbatch.{name}", str(text), "is an option of sbatch") for name, text in profile.sbatch.items()]
    return [*lines, *variables, *options]


def _with_launcher(profile: ClusterProfile, launcher: str | None) -> ClusterProfile:
    if launcher is None:
        return profile
    if launcher not in ("srun", "deepspeed"):
        raise UserError(f"--launcher: got {launcher!r}; allowed are srun and deepspeed; name one of them")
    return ClusterProfile(**{**vars(profile), "launcher": launcher})
