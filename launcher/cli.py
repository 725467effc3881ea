"""The command line, ``omnivl``: a table of commands, each imported only when it is called.

A new command is a module of ``launcher.commands`` with a function (or a Typer app) and one line in ``COMMANDS``. Its
docstring is its help, and ends with examples.

Exit status: 0 done, 1 a failure, 2 a mistake of the user; of runs also 75 for a hang, 128 + n for an end by signal n.
"""

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from engine.plan.paths import expanded
from engine.telemetry.console import PlainConsole
from engine.watch.failure import DEBUG, describe_error
from launcher.arguments import keep_in_range
from omnivl.errors import UserError
from omnivl.shown import printable


@dataclass(frozen=True)
class Command:
    """Location and description of a command.

    Attributes:
        module: Module of ``launcher.commands`` that holds it.
        attribute: A function, or a Typer app with commands of its own.
        help: One line for ``omnivl --help``.
    """

    module: str
    attribute: str
    help: str


COMMANDS: Mapping[str, Command] = {
    "check": Command("check", "check", "Reads a plan and prints what it would do, or all its errors."),
    "upgrade": Command("upgrade", "upgrade", "Rewrites a plan with old field names into today's form."),
    "profile": Command("profile", "profile", "Measures the cost of each layer of a plan's model on this machine."),
    "estimate": Command("estimate", "estimate", "Estimates memory, traffic, time and layouts of a plan on a cluster."),
    "measure": Command("measure", "measure", "Measures this machine's profile for estimates."),
    "pretrain": Command("pretrain", "pretrain", "Runs a plan, or resumes an interrupted run."),
    "submit": Command("submit", "submit", "Writes and submits a Slurm job that runs a plan."),
    "jobs": Command("jobs", "jobs", "Shows submitted jobs: state, step, throughput, estimated end."),
    "evaluate": Command("evaluate", "command", "Scores a trained stage, with chance and a pixel baseline."),
    "predict": Command("predict", "predict", "Writes a task's predictions, also in the forms of benchmarks' servers."),
    "embed": Command("embed", "embed", "Writes embeddings of a data source's pictures and captions."),
    "export": Command("export", "export", "Exports a trained stage as a Hugging Face folder."),
    "serve": Command("serve", "serve", "Opens a page to try a run on: sentences, drawings, pictures, clips."),
    "routing": Command("routing", "routing", "Shows which expert took which patch and which word."),
    "experts": Command("experts", "experts", "Prunes or merges a trained stage's experts and measures each step."),
    "checkpoint": Command("checkpoint", "app", "Inspects, verifies, converts and averages checkpoints."),
    "sweep": Command("sweep", "app", "Runs scaling experiments from one file, and makes their page."),
    "report": Command("report", "report", "Rebuilds report.html of a run."),
    "data": Command("data", "app", "Builds, inspects and converts data."),
}


class LazyGroup(TyperGroup):
    """Imports a command's module when the command is called. ``--help`` imports none: torch takes seconds."""

    _only_names = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None where there is none."""
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        if self._only_names:
            return _named(cmd_name, _placeholder, command.help)
        return _named(
            cmd_name,
            getattr(importlib.import_module(f"launcher.commands.{command.module}"), command.attribute),
            command.help,
        )

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the list of commands without importing them."""
        with self._names():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Completes names of commands without importing them."""
        with self._names():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _names(self) -> Iterator[None]:
        self._only_names = True
        try:
            yield
        finally:
            self._only_names = False


def _placeholder() -> None:
    """Placeholder of a command where only its name is needed."""


def _named(name: str, target: Any, description: str) -> Any:
    """A Typer app or function as a click command."""
    command: Any
    if isinstance(target, typer.Typer):
        command = typer.main.get_group(target)
        command.name = name
        command.help = command.short_help = description
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(
            name, help=target.__doc__ if target is not _placeholder else description, short_help=description
        )(target)
        command = typer.main.get_command(single)
    _keep_examples(command)
    keep_in_range(command)
    return command


def _keep_examples(command: Any) -> None:
    """Keeps the example lines at the end of a docstring from being joined into one paragraph."""
    if command.help is not None:
        command.help = command.help.replace("\n\nExamples:\n", "\n\n\b\nExamples:\n")
    for one in getattr(command, "commands", {}).values():
        _keep_examples(one)


app = typer.Typer(
    cls=LazyGroup,
    name="omnivl",
    help="Pretrains vision-language models of images and videos from YAML plans.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"omnivl {version_here()}")
        raise typer.Exit


def version_here() -> str:
    """The version of the installed package; of a folder that was never installed, where it is."""
    try:
        return importlib.metadata.version("omnivl-engine")
    except importlib.metadata.PackageNotFoundError:
        return f"of the folder {Path(__file__).parents[1]}, which is not installed"


def with_paths_expanded(arguments: Sequence[str]) -> list[str]:
    """The command line with ``~`` and variables expanded that no shell saw: in ``--out=~/x``, or between quotes.

    Overrides stay as they are; the paths among them are expanded where plans are read.
    """
    written = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and equals and value.startswith(("~", "$")):
            argument = f"{name}={expanded(value)}"
        elif argument.startswith(("~/", "$")) and not equals:
            argument = expanded(argument)
        written.append(argument)
    return written


@app.callback()
def _omnivl(
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"  # also for the processes that a command starts


def main() -> NoReturn:
    """Runs the command line; see the exit status above."""
    code = 0
    try:
        app(with_paths_expanded(sys.argv[1:]))
    except UserError as error:
        told, code = describe_error(error), 2
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and DEBUG not in os.environ:
            path = printable(error.filename)
            told, code = f"{path}: {error.strerror}; name another path, or mend what keeps this one from being used", 2
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            told, code = describe_error(error), 1
            told += f"\nraised at {place.filename}:{place.lineno}; omnivl --debug COMMAND shows how it came to this"
    if code:
        PlainConsole(stderr=True).print(told, style="red", soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
