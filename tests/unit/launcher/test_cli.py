"""The command line as a whole: help with examples that hold, completion, errors with and without tracebacks."""

import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engine.watch.failure import DEBUG
from launcher import cli
from omnivl.errors import UserError


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by what is typed for it."""
    root = typer.main.get_command(cli.app)
    context = root.make_context("omnivl", ["check"])
    waiting = [(f"omnivl {name}", root.get_command(context, name)) for name in cli.COMMANDS]
    while waiting:
        name, command = waiting.pop(0)
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            waiting += [(f"{name} {one}", below[one]) for one in below]


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_can_be_typed(name: str) -> None:
    text = CliRunner().invoke(cli.app, [*name.split()[1:], "--help"], catch_exceptions=False).output
    _, _, after = text.partition("\n  Examples:\n")
    lines = [line.strip() for line in after.split("\n\n")[0].splitlines()]
    assert lines, text
    for line in lines:
        words = shlex.split(line)
        start = words.index("omnivl")
        count = len(name.split())
        assert " ".join(words[start : start + count]) == name, line
        COMMANDS[name].make_context(name, words[start + count :])  # raises where an option or an argument is wrong


def test_list_of_commands_imports_none_of_them() -> None:
    code = """
import sys
from launcher.cli import app
app(["--help"], standalone_mode=False)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("typed", "found"),
    [("omnivl ch", ["check", "checkpoint"]), ("omnivl checkpoint ", ["inspect", "verify", "convert", "average"])],
)
def test_bash_completes(typed: str, found: list[str]) -> None:
    words = typed.split(" ")
    environment = {"_OMNIVL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'omnivl'; from launcher.cli import main; main()"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == found


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("plan.yaml:3: got x; allowed y; change it"), 2, "plan.yaml:3: got x; allowed y; change it\n"),
        (KeyError("x"), 1, "KeyError: 'x'\nraised at "),
    ],
)
def test_tracebacks_are_shown_where_they_are_asked_for(
    raised: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    quiet = capsys.readouterr().err
    assert quiet.startswith(said) and "Traceback" not in quiet
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last)") and "in fail" in told


@pytest.mark.parametrize("installed", ["1.2.3", None])
def test_the_version(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    expected = f"of the folder {Path(cli.__file__).parents[1]}, which is not installed"
    told = CliRunner().invoke(cli.app, ["--version"])
    assert (told.exit_code, told.output) == (0, f"omnivl {installed or expected}\n")
