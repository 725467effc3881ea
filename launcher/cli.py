"""The command line, ``omnivl``: a table of commands, each imported only when it is called.

A new command is a module of this package with a function (or a Typer app) and one line in ``COMMANDS``.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from omnivl.errors import UserError


@dataclass(frozen=True)
class Command:
    """Where a command is and what it does.

    Attributes:
        module: Module that holds it.
        attribute: A function, or a Typer app with commands of its own.
        help: One line for ``omnivl --help``.
    """

    module: str
    attribute: str
    help: str


COMMANDS: Mapping[str, Command] = {
    "check": Command("launcher.check", "check", "Reads a plan and prints what it would do, or everything wrong in it."),
    "profile": Command(
        "launcher.profile", "profile", "Measures what each layer of a plan's model takes on this machine."
    ),
    "estimate": Command(
        "launcher.estimate", "estimate", "Works out memory, traffic, time and layouts of a plan on a cluster."
    ),
    "measure": Command("launcher.measure", "measure", "Measures this machine's profile for estimates."),
    "pretrain": Command("launcher.pretrain", "pretrain", "Runs a plan, or goes on with a run that was cut off."),
    "submit": Command(
        "launcher.slurm.submit", "submit", "Writes a job that runs a plan on a Slurm cluster, submits it."
    ),
    "jobs": Command("launcher.slurm.jobs", "jobs", "Shows submitted jobs: state, step, throughput, estimated end."),
    "evaluate": Command("launcher.evaluate", "command", "Scores a trained stage beside chance and a pixel baseline."),
    "embed": Command("launcher.embed", "embed", "Writes embeddings of a data source's pictures and captions."),
    "export": Command("launcher.export", "export", "Writes a trained stage as a folder of Hugging Face."),
    "routing": Command("launcher.routing", "routing", "Shows which expert took which patch and which word."),
    "checkpoint": Command("launcher.checkpoint", "app", "Inspects, verifies, converts and averages checkpoints."),
    "sweep": Command("launcher.sweep", "app", "Runs scaling experiments from one file, and makes their page."),
    "report": Command("launcher.report", "report", "Makes report.html of a run again."),
    "data": Command("launcher.data", "app", "Builds, inspects and converts data."),
}


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is called. ``--help`` imports none: torch takes seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None where there is none."""
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        if getattr(self, "_listing", False):
            return _named(cmd_name, _placeholder, command.help)
        return _named(cmd_name, getattr(importlib.import_module(command.module), command.attribute), command.help)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the list of commands without importing them."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _placeholder() -> None:
    """Stands for a command while the list of commands is printed."""


def _named(name: str, target: Any, description: str) -> Any:
    """A Typer app or function as a click command."""
    if isinstance(target, typer.Typer):
        group = typer.main.get_group(target)
        group.name, group.help = name, description
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=target.__doc__ if target is not _placeholder else description)(target)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    name="omnivl",
    help="Pretrains vision-language models of images and videos from YAML plans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _omnivl() -> None:
    """Keeps Typer from folding a single command into the app."""


def main() -> NoReturn:
    """Runs the command line. A user's mistake is printed without a traceback; the exit status is then 2."""
    try:
        app()
    except UserError as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
