"""Extracts the commands of the documents and of the help, makes plans short enough to run them, and runs them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import patience
import yaml

from engine.plan.yaml import read_yaml
from launcher.cli import COMMANDS, LazyGroup

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"

_BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    """The texts of a document's fenced blocks of one language."""
    return [text for kind, text in _BLOCK.findall(document.read_text(encoding="utf-8")) if kind == language]


def commands(document: Path) -> list[str]:
    """The lines of a document's blocks of bash, without comments."""
    lines = [line.partition(" #")[0].strip() for text in blocks(document, "bash") for line in text.splitlines()]
    return [line for line in lines if line]


def _examples() -> Iterator[str]:
    group: Any = LazyGroup(name="omnivl")
    commands = [group.get_command(None, name) for name in COMMANDS]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        _, found, lines = (command.help or "").partition("Examples:\n")
        yield from (line.strip() for line in lines.splitlines() if found and line.strip())


def help_examples() -> list[str]:
    """The lines below ``Examples:`` in the help of every command and subcommand."""
    return sorted(set(_examples()))


def shell(command: str, folder: Path) -> str:
    """What a command that is typed in a folder prints. It has to end well."""
    done = patience.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        limit=400,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def shell_until(command: str, folder: Path, said: str) -> str:
    """What a command prints that goes on until Ctrl-C, which it gets after the first line that begins with ``said``."""
    process = subprocess.Popen(
        ["bash", "-ec", f"exec {command}"],
        cwd=folder,
        env={**_environment(), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith(said):
                break
        process.send_signal(signal.SIGINT)
        rest, _ = patience.communicate(process, 20)
        assert process.returncode == 0 and printed[-1].startswith(said), "".join(printed) + rest
        return "".join(printed) + rest
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return {**environment, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def copy_configs(folder: Path) -> None:
    """Copies ``configs`` into a folder, with a few steps in each stage and few samples in each evaluation."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for file in [*(folder / "configs" / "plans").glob("*.yaml"), *(folder / "configs" / "sweeps").glob("*.yaml")]:
        tree = read_yaml(file.read_text()).tree  # YAML 1.1 reads the key ``on`` as true
        file.write_text(yaml.safe_dump(_shortened(tree), sort_keys=False))


_SHORT = {"steps": 4, "micro_batch_size_per_gpu": 8, "warmup_steps": 2, "every": 2, "stages.contrast.steps": [2, 3]}


def _shortened(node: Any) -> Any:
    if isinstance(node, list):
        return [_shortened(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    short = {key: _SHORT.get(key, _shortened(value)) for key, value in node.items()}
    tasks = [*short.get("tasks", [])]
    for sampled in [*tasks, *(task["baseline"] for task in tasks if "baseline" in task)]:
        sampled["max_samples"] = 24
    return short
