"""Mutated plans, overrides, sweeps, machines, clusters, task lists, model files: every one is read or refused by name.

``python tests/mutated_files.py COUNT [SEED]`` mutates so many by hand, checks the plans that are accepted as
``omnivl check`` does, and prints what raised something else, or took longer than ``SLOW_SECONDS`` of processor time.
"""

import copy
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.estimate.hardware import HardwareConfig
from engine.plan.parse import parse_as, parse_plan, parse_tasks
from engine.plan.rewrite import rewrite_model_file, rewrite_plan
from engine.plan.yaml import read_yaml, write_yaml
from engine.sweep.config import parse_sweep
from launcher.commands.check import summarize
from launcher.slurm.profile import ClusterProfile
from omnivl.errors import UserError

ROOT = Path(__file__).parents[1]
SLOW_SECONDS = 5.0

_PLANS = (
    "quickstart",
    "clip_tiny",
    "coca_tiny",
    "git_tiny",
    "simvlm_tiny",
    "pali_tiny",
    "albef_tiny",
    "blip_tiny",
    "blip2_tiny",
    "meter_tiny",
    "flamingo_tiny",
    "frozen_tiny",
    "limoe_tiny",
    "vilt_tiny",
    "vqa_tiny",
    "beit3_tiny",
)
_TASKS = "tasks:\n  - retrieval\n  - {kind: zero_shot, name: labels, prompts: ['a {label}'], where: {split: [train]}}\n"
_SWEEP = """name: s
plan: quickstart.yaml
overrides: {model.patch_size: 16}
axes:
  size: {w64: {model.hidden_size: 64, model.num_heads: 2}, w96: {model.hidden_size: 96, model.num_heads: 3}}
  seed: [0, 1]
exclude: [{size: w96, seed: 1}]
points: [{size: w64, seed: 1}]
parallel: 2
compare: size
"""
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e30, 1e300, -1e300, 2**31, 2**53, 2**63, 2**64, 10**18),
    *("", "x", "auto", "no", "1", "1e5", "../x", "/", "/dev/null", "[/nope]", "{label}", "a\nb", "\u2028", "é" * 300),
    *("emoji", "motion", "pipe:true", "mlm", "univlc", "image_text", "video_label", "limoe", "zero", "pipeline", "~/x"),
    *([], {}, [[]], [1, 2], [None], ["x"], {"kind": "x"}, {"kind": None}, {"kind": []}, {"a": {"b": 1}}, {"": 1}),
    *({"kind": "retrieval"}, {"kind": "limoe", "num_experts": 3}, {"kind": "mlm", "probability": 2}),
)
_TEXTS = (
    *('!!int "abc"', '!!float ""', "!!bool yes", "!!null x", "!!map [1]", "!!python/object:os.system", "!<%FF> x"),
    *("9" * 5000, "[" * 900, "{" * 200, "- " * 900, '"\\ud800"', '"\\UFFFFFFFF"', '"\\0"', '"\\e[31m"', "\x1b", "\x00"),
    *("&a [*a]", "*a", "&a x", "<<: *a", "? [a]", "%YAML 9.9", "---", "...", "\t", "#", ":", "-", "|", ">", "'", '"'),
    *(
        "\udcff",
        "\ufeff",
        "\x85",
        "\u2028",
        "[/nope]",
        "{",
        "}",
        "]",
        ",",
        "1e400",
        ".nan",
        "-.inf",
        "0x1f",
        "1:30",
        "~",
    ),
)


@dataclass(frozen=True)
class Case:
    """One mutated input.

    Attributes:
        kind: Which reader takes it.
        text: The file.
        overrides: For a plan.
    """

    kind: str
    text: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A case that was neither read nor refused by name, or that took too long."""

    number: int
    case: Case
    said: str


def case_of(number: int, seed: int = 0) -> Case:
    """The case of a number: the same on every machine."""
    draw = random.Random(f"{seed}/{number}")
    kind = draw.choice(
        ["plan"] * 6 + ["overrides"] * 4 + ["upgrade", "sweep", "sweep", "hardware", "cluster", "tasks", "model"]
    )
    text = _original(kind, draw.choice(_PLANS))
    if kind == "overrides":
        tree = read_yaml(text).tree
        return Case(kind, text, tuple(_override(tree, draw) for _ in range(draw.randint(1, 3))))
    if draw.random() < 0.35:
        for _ in range(draw.randint(1, 4)):
            text = _mutated_text(text, draw)
        return Case(kind, text)
    tree = copy.deepcopy(read_yaml(text).tree)
    for _ in range(draw.randint(1, 3)):
        _mutate(tree, draw)
    return Case(kind, write_yaml(tree))


def read_case(case: Case, then: Callable[[Any], object] = lambda plan: None) -> None:
    """Reads a case as its command would.

    Args:
        case: Any.
        then: What is done with a plan that was accepted.

    Raises:
        UserError: The case is refused.
    """
    match case.kind:
        case "plan" | "overrides":
            then(parse_plan(case.text, "p", case.overrides))
        case "upgrade":
            rewrite_plan(case.text, "p")
        case "sweep":
            parse_sweep(case.text, ROOT / "configs" / "plans" / "sweep.yaml")
        case "hardware":
            parse_as(HardwareConfig, read_yaml(case.text, "h"))
        case "cluster":
            parse_as(ClusterProfile, read_yaml(case.text, "c"))
        case "tasks":
            parse_tasks(read_yaml(case.text, "t"))
        case "model":
            rewrite_model_file(case.text, "m")


def findings(numbers: range, seed: int = 0, then: Callable[[Any], object] = lambda plan: None) -> Iterator[Finding]:
    """The cases of some numbers that went wrong."""
    for number in numbers:
        case = case_of(number, seed)
        began = time.process_time()
        try:
            read_case(case, then)
        except UserError as error:
            if not str(error).replace("\n", "").replace("\t", "").isprintable():
                yield Finding(number, case, f"a message with control characters: {str(error)!r}")
        except Exception:
            yield Finding(number, case, traceback.format_exc())
        if (spent := time.process_time() - began) > SLOW_SECONDS:
            yield Finding(number, case, f"took {spent:.1f} s")


@cache
def _original(kind: str, plan: str) -> str:
    match kind:
        case "sweep":
            return _SWEEP
        case "tasks":
            return _TASKS
        case "hardware":
            return (ROOT / "configs" / "hardware" / "h100.yaml").read_text(encoding="utf-8")
        case "cluster":
            return (ROOT / "configs" / "clusters" / "example.yaml").read_text(encoding="utf-8")
        case "model":
            return (ROOT / "configs" / "models" / "debug.yaml").read_text(encoding="utf-8")
        case _:
            return (ROOT / "configs" / "plans" / f"{plan}.yaml").read_text(encoding="utf-8")


def _holders(tree: Any) -> Iterator[tuple[Any, Any]]:
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(members):
        yield tree, key
        yield from _holders(value)


def _mutate(tree: Any, draw: random.Random) -> None:
    places = list(_holders(tree))
    if not places:
        return
    holder, key = draw.choice(places)
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, from_key = draw.choice(places)
            if from_key in other if isinstance(other, dict) else from_key < len(other):
                holder[key] = copy.deepcopy(other[from_key])
        case 2 if isinstance(holder, dict):
            holder[draw.choice([*(str(one) for _, one in places), "x", "", "a.b", "[/nope]"])] = draw.choice(_VALUES)
        case 3 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            holder[key] = copy.deepcopy(draw.choice(_VALUES))


def _mutated_text(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text) + 1)
    match draw.randrange(4):
        case 0:
            return text[:place] + text[place + draw.randint(1, 20) :]
        case 1:
            return text[:place] + text[max(0, place - 30) : place] + text[place:]
        case 2:
            lines = text.split("\n")
            line = draw.randrange(len(lines))
            name, colon, _ = lines[line].partition(": ")
            lines[line] = f"{name}{colon}{draw.choice(_TEXTS)}"
            return "\n".join(lines)
        case _:
            return text[:place] + draw.choice(_TEXTS) + text[place:]


def _override(tree: Any, draw: random.Random) -> str:
    parts: list[str] = []
    node = tree
    while isinstance(node, dict | list) and node and (not parts or draw.random() < 0.8):
        key = draw.choice(list(node) if isinstance(node, dict) else list(range(len(node))))
        parts.append(str(key))
        node = node[key]
    if draw.random() < 0.2:
        parts.append(draw.choice(["x", "", "0", "-1", "99", "²", "name", "\udcff", "[/nope]", "kind"]))
    value = draw.choice(_TEXTS) if draw.random() < 0.5 else json.dumps(draw.choice(_VALUES))
    return draw.choice(["{}={}", "{}={}", "{}={}", "{} {}", "{}"]).format(".".join(parts), value)


def main() -> None:
    """Mutates as many as the command line says."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began, found = time.monotonic(), 0
    for finding in findings(range(count), seed, summarize):
        found += 1
        print(f"--- {seed}/{finding.number} {finding.case.kind} {finding.case.overrides}\n{finding.said[-1500:]}")
    print(f"{count} inputs, {found} findings, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
