"""Extracts the commands of the documents, and makes plans short enough to run them."""

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

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


def copy_configs(folder: Path) -> None:
    """Copies ``configs`` into a folder, with a few steps in each stage and few samples in each evaluation."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for file in [*(folder / "configs" / "plans").glob("*.yaml"), *(folder / "configs" / "sweeps").glob("*.yaml")]:
        file.write_text(yaml.safe_dump(_shortened(yaml.safe_load(file.read_text())), sort_keys=False))


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
