"""What jobs request of a cluster, as options of the commands that submit them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.plan.consent import Reach, refuse_foreign
from launcher.commands.signature import set_options
from launcher.slurm.profile import ClusterProfile, load_profile
from launcher.slurm.script import OptionValue, check_options
from launcher.slurm.submission import Request
from omnivl.errors import UserError


@dataclass(frozen=True)
class Resources:
    """The options; each is described by its help."""

    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs on each node, and as many ranks; 0 trains on CPUs.", show_default=False),
    ] = None
    processes_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on each node, where they are not as many as GPUs.", show_default=False),
    ] = None
    partition: Annotated[str | None, typer.Option(help="sbatch's --partition.", show_default=False)] = None
    time_limit: Annotated[
        str | None, typer.Option("--time", help="sbatch's --time, e.g. 24:00:00.", show_default=False)
    ] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Any other option of sbatch, e.g. account=vision or exclusive.", show_default=False),
    ] = None
    cluster: Annotated[
        Path | None,
        typer.Option(envvar="OMNIVL_CLUSTER", help="The cluster's file; see configs/clusters/.", show_default=False),
    ] = None
    launcher: Annotated[
        str | None, typer.Option(help="srun or deepspeed; the cluster's by default.", show_default=False)
    ] = None

    def request(self, *, allow_commands: bool) -> Request:
        """What is requested of Slurm.

        Raises:
            UserError: An option that the job's script sets itself, or an unknown launcher.
            PlanError: Mistakes in the cluster's file, or it is another user's, who may not say what a job runs.
        """
        profile = _with_launcher(load_profile(self.cluster), self.launcher)
        if self.cluster is not None:
            refuse_foreign(_commands(profile), [self.cluster], allowed=allow_commands)
        check_options(profile.sbatch, f"{self.cluster}: sbatch")
        options: dict[str, OptionValue] = {}
        for text in self.sbatch or ():
            name, equals, value = text.removeprefix("--").partition("=")
            options[name] = value if equals else True
        options |= {} if self.partition is None else {"partition": self.partition}
        options |= {} if self.time_limit is None else {"time": self.time_limit}
        check_options(options, "--sbatch")
        gpus = profile.gpus_per_node or 0 if self.gpus_per_node is None else self.gpus_per_node
        return Request(profile, self.nodes, gpus, self.processes_per_node, options)


def takes_resources(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of ``Resources``, where its signature has ``resources``."""
    shared = inspect.signature(Resources).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        resources = Resources(**{name: given.pop(name) for name in shared})
        command(**given, resources=resources)

    own = inspect.signature(command).parameters.values()
    set_options(run, (option for one in own for option in (shared.values() if one.name == "resources" else (one,))))
    return run


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
