"""Every example of every ``--help``: it parses, and the bundled plans that it names are right with its overrides."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from documentation import ROOT, help_examples

from engine.plan.parse import load_plan
from launcher.cli import COMMANDS, app

EXAMPLES = help_examples()


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
