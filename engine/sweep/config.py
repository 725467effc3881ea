"""A sweep file: a base plan, the axes along which its runs differ, and the selected combinations.

    name: sizes
    plan: ../plans/emoji_small.yaml     # relative to this file
    overrides: {model.patch_size: 16}   # of the plan, for all runs
    axes:
      size:                             # an axis of named values, each a few overrides of the plan
        w64: {model.hidden_size: 64, model.num_heads: 2}
        w96: {model.hidden_size: 96, model.num_heads: 3}
      seed: [0, 1, 2]                   # an axis of one field's values
    exclude:                            # combinations that are left out
      - {size: w96, seed: 2}
    points:                             # more runs beside the grid, by the same axes
      - {size: w96, seed: 5}
    parallel: 2                         # runs at the same time on one machine

A field is written as for ``omnivl pretrain``: ``stages.joint.optimizer.lr``. Two names are no fields of a plan:
``nodes`` is the number of nodes of a run on Slurm, ``plan`` the base plan, relative to this file, of runs with a value.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import PlanError
from engine.plan.parse import load_plan
from engine.plan.plan import Plan
from engine.plan.yaml import Document, Problem, read_yaml, show_value
from omnivl.data.plain_files import read_small
from omnivl.errors import did_you_mean, reason_of

_UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")
_NODES, _PLAN = "nodes", "plan"
_LARGEST_COUNT = 100_000
_MOST_RUNS = 2_000
_FIELDS = ("name", "plan", "overrides", "axes", "exclude", "points", "parallel", "compare")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: Of the run and its folder.
        values: The value of each axis, by the axis' name; for named values the value's name.
        overrides: Applied to the base plan, ``path=value`` each.
        plan: The resulting plan.
        base: The base plan's file, the sweep's or one that a value of an axis names.
        nodes: Number of nodes on Slurm; None if the sweep does not set it.
    """

    name: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    plan: Plan
    base: Path
    nodes: int | None = None


@dataclass(frozen=True)
class Sweep:
    """A whole sweep.

    Attributes:
        name: Of the sweep and its folder.
        file: The sweep file.
        base: The base plan's file.
        axes: Values of each axis: the overrides of each, by the value's name.
        points: The runs, in the order of the grid.
        parallel: Runs at the same time on one machine.
        compare: The axis whose values are drawn as separate curves, e.g. dense against experts; None for one curve.
    """

    name: str
    file: Path
    base: Path
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    points: tuple[Point, ...]
    parallel: int
    compare: str | None

    @property
    def bases(self) -> str:
        """Names of the base plans of its runs."""
        return ", ".join(dict.fromkeys(point.base.name for point in self.points)) or self.base.name

    def plan_for(self, point: Point, world_size: int) -> Plan:
        """The plan of one run, checked for a number of processes.

        Raises:
            PlanError: The plan does not fit this number; names the run.
        """
        return _read_plan(self.file, point.base, point.name, point.overrides, world_size)


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep and the plan of each of its runs.

    Raises:
        PlanError: Names every mistake of the file with its line, or those of the first run whose plan has mistakes.
    """
    try:
        text = read_small(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            [f"{path}: got a file that cannot be read ({reason_of(error)}); allowed a YAML file; name a sweep"]
        ) from error
    return parse_sweep(text, path)


def parse_sweep(text: str, path: Path) -> Sweep:
    """The same of a sweep's text.

    Args:
        text: The YAML.
        path: Its file, from which the base plan's path goes out.

    Raises:
        PlanError: As for ``load_sweep``.
    """
    document = read_yaml(text, str(path))
    problems = list(document.problems) or list(_problems(document))
    if problems:
        raise PlanError([f"{document.place(problem.path)}: {problem.text}" for problem in problems])
    tree = document.tree
    axes = {name: _values(name, axis) for name, axis in tree["axes"].items()}
    base = (path.parent / tree["plan"]).resolve()
    return Sweep(
        name=tree["name"],
        file=path,
        base=base,
        axes=axes,
        points=tuple(_points(tree, axes, path, base)),
        parallel=tree.get("parallel", 1),
        compare=tree.get("compare"),
    )


def _read_plan(file: Path, base: Path, run: str, overrides: Sequence[str], world_size: int | None = None) -> Plan:
    try:
        return load_plan(base, overrides, world_size)
    except PlanError as error:
        raise PlanError([f"{file}: run {run!r}: {problem}" for problem in error.problems]) from error


def _values(name: str, axis: Any) -> dict[str, Mapping[str, Any]]:
    if isinstance(axis, Mapping):
        return {str(value): fields for value, fields in axis.items()}
    return {_shown(value): {name: value} for value in axis}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _points(
    tree: Mapping[str, Any], axes: Mapping[str, Mapping[str, Mapping[str, Any]]], file: Path, base: Path
) -> Iterator[Point]:
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    excluded = [{axis: _shown(value) for axis, value in one.items()} for one in tree.get("exclude", [])]
    wanted = [one for one in grid if not any(left.items() <= one.items() for left in excluded)]
    wanted += [{axis: _shown(value) for axis, value in one.items()} for one in tree.get("points", [])]
    seen = set()
    for values in wanted:
        name = "_".join(f"{_slug(axis.rpartition('.')[2])}-{_slug(value)}" for axis, value in values.items())
        if name not in seen:
            seen.add(name)
            fields = dict(tree.get("overrides", {}))
            for axis, chosen in values.items():
                fields |= axes[axis][chosen]
            nodes = fields.pop(_NODES, None)
            own = (file.parent / fields.pop(_PLAN)).resolve() if _PLAN in fields else base
            overrides = [f"{field}={json.dumps(value)}" for field, value in ({"name": name} | fields).items()]
            yield Point(name, values, tuple(overrides), _read_plan(file, own, name, overrides), own, nodes)


def _slug(text: str) -> str:
    return _UNSAFE.sub("-", text).strip("-.") or "x"


def _problems(document: Document) -> Iterator[Problem]:
    tree = document.tree
    if not isinstance(tree, dict):
        yield Problem((), show_value(tree), f"a mapping with {', '.join(_FIELDS)}", "write a sweep")
        return
    for field in tree:
        if field not in _FIELDS:
            change = did_you_mean(str(field), _FIELDS, "remove it")
            yield Problem((field,), "an unknown field", ", ".join(_FIELDS), change)
    axes = tree.get("axes")
    checks: dict[str, tuple[Callable[[Any], bool], str, str]] = {
        "name": (_is_file_name, "letters, digits, '-', '_' and '.'", "name the sweep"),
        "plan": (_is_text, "the path of a plan, from this file", "name the base plan"),
        "overrides": (lambda value: isinstance(value, dict), "a mapping of fields of the plan", "write one"),
        "axes": (
            lambda value: isinstance(value, dict) and bool(value),
            "a mapping of at least one axis to a list of values, or to named overrides",
            "write an axis",
        ),
        "parallel": (_is_count, f"1 or more, at most {_LARGEST_COUNT:,}", "change it"),
        "compare": (
            lambda value: isinstance(value, str) and isinstance(axes, dict) and value in axes,
            "the name of an axis",
            "name one of the axes",
        ),
    }
    for field, (is_right, allowed, change) in checks.items():
        if field in tree or field in ("name", "plan", "axes"):
            value = tree.get(field)
            if not is_right(value):
                yield Problem((field,), show_value(value), allowed, change)
    if not isinstance(axes, dict):
        return
    wrong = [name for name, axis in axes.items() if not _is_axis(axis)]
    for name in wrong:
        allowed = "a list of values, or a mapping of names to overrides, at least one"
        yield Problem(("axes", name), show_value(axes[name]), allowed, "write them")
    if wrong:
        return
    if (runs := math.prod(len(axis) for axis in axes.values())) > _MOST_RUNS:
        yield Problem(("axes",), f"{runs:,} combinations", f"at most {_MOST_RUNS:,}", "leave values out")
    for name, axis in axes.items():
        for value, fields in _values(name, axis).items():
            if _NODES in fields and not _is_count(fields[_NODES]):
                said = ("axes", name, value, _NODES) if isinstance(axis, dict) else ("axes", name)
                yield Problem(
                    said, show_value(fields[_NODES]), f"1 or more nodes, at most {_LARGEST_COUNT:,}", "change it"
                )
            if _PLAN in fields and not _is_text(fields[_PLAN]):
                said = ("axes", name, value, _PLAN) if isinstance(axis, dict) else ("axes", name)
                yield Problem(said, show_value(fields[_PLAN]), "the path of a plan, from this file", "name a plan")
    for field in ("exclude", "points"):
        entries = tree.get(field, [])
        if not isinstance(entries, list):
            yield Problem((field,), show_value(entries), "a list", "write a list of combinations")
            continue
        for index, entry in enumerate(entries):
            yield from _combination_problems((field, index), entry, axes, whole=field == "points")


def _combination_problems(path: tuple[str | int, ...], entry: Any, axes: Any, *, whole: bool) -> Iterator[Problem]:
    if not isinstance(entry, dict) or not entry:
        yield Problem(path, show_value(entry), "a mapping of axes to values", "write one")
        return
    for axis, value in entry.items():
        if axis not in axes:
            yield Problem((*path, axis), "no axis", ", ".join(axes), "name an axis")
        elif _shown(value) not in (known := _values(axis, axes[axis])):
            yield Problem((*path, axis), show_value(value), ", ".join(known), "name one of its values")
    if whole and (missing := [axis for axis in axes if axis not in entry]):
        yield Problem(path, f"no value of {', '.join(missing)}", "a value of every axis", "add what is missing")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_COUNT


def _is_axis(axis: Any) -> bool:
    if isinstance(axis, dict):
        return bool(axis) and all(isinstance(fields, dict) for fields in axis.values())
    return isinstance(axis, list) and bool(axis)
