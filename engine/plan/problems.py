"""Turns pydantic's errors into problems of the plan: with the path in the plan, the value and the allowed values."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from engine.plan.other_names import field_here, kind_here
from engine.plan.schema import (
    annotation_at,
    choices,
    dataclass_at,
    describe,
    describe_range,
    field_types,
    kinds,
    members,
)
from engine.plan.yaml import Path, Problem, read_yaml, show_value
from omnivl.errors import did_you_mean

_FIELD_MESSAGES = (
    re.compile(r"^\w+\.(?P<field>\w+): got (?P<got>.+), allowed is (?P<allowed>.+)$"),
    re.compile(r"^objective \w+: (?P<field>\w+) must be (?P<allowed>.+), got (?P<got>.+)$"),
)
"""Pattern of the messages with which configurations refuse a field in ``__post_init__``."""


_ABSENT = ("missing", "unexpected_keyword_argument")


def translate(error: ValidationError, cls: type, tree: Any) -> list[Problem]:
    """All problems of a failed validation, one per path.

    Args:
        error: From validating ``(tree,)`` as ``tuple[cls]``.
        cls: The dataclass.
        tree: What was validated.
    """
    problems: dict[Path, Problem] = {}
    for entry in error.errors(include_url=False):
        path = _plain_path(entry["loc"][1:], tree, names_absent=entry["type"] in _ABSENT)
        problem = _problem(entry, path, cls, tree)
        problems.setdefault(problem.path, problem)
    return list(problems.values())


def _problem(entry: Mapping[str, Any], path: Path, cls: type, tree: Any) -> Problem:
    """The problem behind one error; for nearly all errors the annotation alone determines its text."""
    annotation = annotation_at(cls, tree, path)
    value = value_at(tree, path)
    match entry["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(path, cls, tree)
        case "missing":
            allowed = describe(annotation) if annotation is not None else "one more entry"
            return Problem(path, "nothing", allowed, f"add {path[-1]!r}" if isinstance(path[-1], str) else "add it")
        case "union_tag_invalid":
            known = list(kinds(annotation))
            here = kind_here(str(value["kind"]), known)
            change = f"write {here}" if here else did_you_mean(str(value["kind"]), known, "choose one of these")
            return Problem((*path, "kind"), show_value(value["kind"]), ", ".join(map(repr, known)), change)
        case "union_tag_not_found":
            return Problem((*path, "kind"), "nothing", ", ".join(map(repr, kinds(annotation))), "add 'kind'")
        case "value_error":
            return _refused(path, str(entry["ctx"]["error"]), value)
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return Problem(path, show_value(value), describe_range(annotation), "change the number")
        case _:
            assert annotation is not None, f"no annotation at {path} for {entry['type']}"
            return Problem(path, show_value(value), describe(annotation), _change(annotation, value))


def _unknown_key(path: Path, cls: type, tree: Any) -> Problem:
    *parent, key = path
    holder = dataclass_at(annotation_at(cls, tree, tuple(parent)), value_at(tree, tuple(parent)))
    assert holder is not None, f"no section at {parent}"
    known = list(field_types(holder))
    here = field_here(str(key), [part for part in parent if isinstance(part, str)], known)
    here = here if here is not None else _elsewhere(str(key), len(parent), cls)
    change = f"write {here}" if here is not None else did_you_mean(str(key), known, "remove it")
    return Problem(path, "an unknown key", ", ".join(known), change)


def _elsewhere(key: str, depth: int, cls: type) -> str | None:
    """What to write instead of a field of a stage at the plan's top, of the plan in a stage, or of a kind anywhere.

    Args:
        key: The key that is not known where it stands.
        depth: How deep that is: 0 for the top, 2 for a stage.
        cls: The plan's dataclass.
    """
    top = field_types(cls)
    stage = annotation_at(top.get("stages"), [{}], (0,))
    own = field_types(stage) if isinstance(stage, type) else {}
    if key in kinds(annotation_at(own.get("objectives"), [{}], (0,))):
        return f"objectives: [{key}] in the stage"
    if depth == 0 and key in own:
        return f"it in a stage: stages.0.{key}"
    return f"it at the plan's top, beside 'stages': {key}" if depth and key in top else None


def _refused(path: Path, message: str, value: Any) -> Problem:
    """A configuration's own check; its message names the field."""
    for pattern in _FIELD_MESSAGES:
        if (match := pattern.match(message)) is not None:
            return Problem((*path, match["field"]), match["got"], match["allowed"], f"change {match['field']}")
    return Problem(path, f"{show_value(value)} that does not hold together", f"one that does ({message})", "change it")


def _change(annotation: Any, value: Any) -> str:
    """Advice on a value of the wrong type."""
    if isinstance(value, str):
        inner = read_yaml(value).tree
        wanted = members(annotation)
        if type(inner) in (int, float, bool) and (type(inner) in wanted or (type(inner) is int and float in wanted)):
            return f"change it to {show_value(inner)}, without quotes"
        if bool in wanted and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"change it to {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        return did_you_mean(value, choices(annotation), f"change it to {describe(annotation)}")
    if isinstance(value, float) and value.is_integer() and int in members(annotation):
        return f"change it to {int(value)}"
    if value is None:
        return "write a value or remove the key"
    return f"change it to {describe(annotation)}"


def _plain_path(location: tuple[str | int, ...], tree: Any, *, names_absent: bool) -> Path:
    """Pydantic's location without the names of union members that it mixes in.

    Args:
        location: Pydantic's, below the tuple that wraps the tree.
        tree: What was validated.
        names_absent: Whether the last part may be absent from the tree.
    """
    path: Path = ()
    told_apart = False  # whether this section's member of a union was named; a key may be called as it
    for depth, part in enumerate(location):
        if isinstance(tree, Mapping) and tree.get("kind") == part and not told_apart:
            told_apart = True
            continue
        known = (isinstance(tree, Mapping) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if known:
            path, tree, told_apart = (*path, part), tree[part], False
        elif names_absent and depth == len(location) - 1:
            path = (*path, part)
    return path


def value_at(tree: Any, path: Path) -> Any:
    """The value at ``path`` in a tree; None if there is none."""
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree
