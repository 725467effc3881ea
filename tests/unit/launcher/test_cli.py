"""The command line as a whole: help with examples that hold, completion, errors with and without tracebacks."""

import contextlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from mutated_commands import FOUND, LINES, findings, findings_of, prepare, run_line
from typer.testing import CliRunner

from engine.watch.failure import DEBUG
from launcher import cli
from omnivl.data.convert.forms import FORMS
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
        if installed is None or f'name="{name}"' not in Path(cli.__file__).parents[1].joinpath("setup.py").read_text():
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    expected = f"of the folder {Path(cli.__file__).parents[1]}, which is not installed"
    told = CliRunner().invoke(cli.app, ["--version"])
    assert (told.exit_code, told.output) == (0, f"omnivl {installed or expected}\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("check plan.yaml --world-size 99999999999", "--world-size: got 99999999999; allowed at most 1,000,000; "),
        ("estimate plan.yaml --days inf", "--days: got inf; allowed at most 36,500; change the number"),
        ("estimate plan.yaml --clip-kb 1e30", "--clip-kb: got 1e+30; allowed at most 1,000,000,000; "),
        ("estimate plan.yaml --micro-batches 100000", "--micro-batches: got 100000; allowed at most 1,000; "),
        ("submit plan.yaml --nodes 20000000", "--nodes: got 20000000; allowed at most 1,000,000; "),
        ("sweep run s.yaml --parallel 5000", "--parallel: got 5000; allowed at most 1,024; change the number"),
        (
            "data inspect emoji --samples 9000000000000",
            "--samples: got 9000000000000; allowed at most 1,000,000,000,000; ",
        ),
        ("pretrain plan.yaml --run-folder=", "--run-folder: got ''; allowed a path; name one ('.' is the folder you "),
        ("pretrain plan.yaml --run-folder ' '", "--run-folder: got ' '; allowed a path; "),
        ("report ''", "run_folder: got ''; allowed a path; "),
        (f"report {'a' * 5000}", "run_folder: got 'aaa"),
        ("pretrain plan.yaml --run-folder x\x1b[31m", "got 'x\\x1b[31m'; allowed a text without control characters; "),
        ("export a b --max-shard-size 0GB", "--max-shard-size: got '0GB'; allowed a whole number above 0 with KB, MB "),
        (f"report {'a' * 300}", "File name too long; name another path, or mend what keeps this one from being used"),
    ],
)
def test_values_that_no_option_takes(
    line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["omnivl", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and told in said and "\x1b" not in said, said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_of_the_command_line_has_a_smallest_one(name: str) -> None:
    """The largest one comes from the limits of all files."""
    for parameter in COMMANDS[name].params:
        descriptor = getattr(parameter, "type_descriptor", None)
        kinds = () if descriptor is None else (descriptor.annotation, *get_args(descriptor.annotation))
        if int in kinds or float in kinds:
            assert parameter.min is not None, f"{name} {parameter.opts}"


@pytest.mark.parametrize(("seed", "count"), [(0, 150)])
def test_mutated_command_lines_work_or_are_refused_by_name(seed: int, count: int, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert list(findings(range(count), tmp_path / "here", seed)) == []


def test_the_line_of_every_converter_works(tmp_path: Path) -> None:
    """Before it is mutated, so that mutations come as far as its options."""
    (tmp_path / "here").mkdir()
    prepare(tmp_path / "here")
    forms = {reader.form for reader in FORMS}
    lines = [line for line in LINES if line[1] == "convert" and line[2] in forms]
    assert len(lines) == len(forms)
    with contextlib.chdir(tmp_path / "here"):
        assert [line for line in lines if run_line(line)[0] != 0] == []


@pytest.mark.parametrize(
    "line",
    [
        ("sweep", "report", "sweep.yaml", "--folder", "\u0663", "--out", "page", "--out", "list.csv"),
        ("embed", *FOUND, "--data", "shards", "--where", "{split: [a]}", "--out", "e.npz", "--out", "."),
        ("pretrain", "plan.yaml", "--run-folder", "runs/x", "--stage", "one", "--stage", "weights.safetensors"),
    ],
    ids=lambda line: line[0],
)
def test_command_lines_that_once_went_wrong(line: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert list(findings_of(line, tmp_path / "here")) == []
