"""Every example of every ``--help``: it parses, and the bundled plans that it names are right with its overrides."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from engine.plan.parse import load_plan
from launcher.cli import COMMANDS, LazyGroup, app

ROOT = Path(__file__).parents[3]


def examples() -> Iterator[str]:
    """The lines below ``Examples:`` in the help of every command and subcommand."""
    group: Any = LazyGroup(name="omnivl")
    commands = [group.get_command(None, name) for name in COMMANDS]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        _, found, lines = (command.help or "").partition("Examples:\n")
        yield from (line.strip() for line in lines.splitlines() if found and line.strip())


EXAMPLES = sorted(set(examples()))


def test_every_command_has_examples() -> None:
    assert {shlex.split(line)[1] for line in EXAMPLES if line.startswith("omnivl ")} == set(COMMANDS)


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_right(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    words = words[words.index("omnivl") + 1 :]
    command: Any = typer.main.get_command(app)
    context = command.make_context("omnivl", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    given = context.params
    plan = given.get("plan")
    if plan is not None and Path(plan).parts[0] == "configs":
        nodes, per_node = given.get("nodes"), given.get("gpus_per_node") or 8
        processes = given.get("world_size") or (nodes and nodes * per_node)
        load_plan(plan, given.get("overrides") or (), processes)
