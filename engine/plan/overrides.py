"""Overrides from the command line: ``stages.joint.optimizer.lr=2e-4``, applied to a plan's tree before it is typed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.plan.yaml import Document, Path, Problem, read_yaml, show_value
from moe.ranges import AUTO
from omnivl.errors import did_you_mean

_SHOWN = 200
_MAX_PARTS = 32


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Writes the overrides into the document's tree, and their places into its places.

    Args:
        document: Changed in place.
        overrides: ``path=value`` each; the value is YAML. A member of a list is named by its index, its ``name`` or its
            ``kind``. Missing keys are created; the typing checks whether they may exist.

    Returns:
        What is wrong with the overrides themselves.
    """
    problems: list[Problem] = []
    for override in overrides:
        place = f"override {override[:_SHOWN]!r}{'' if len(override) <= _SHOWN else ' ...'}"
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.isprintable() or not dotted or dotted.count(".") > _MAX_PARTS:
            path: Path = (override[:_SHOWN],)
            document.places[path] = place
            problems.append(Problem(path, "no path=value", "e.g. stages.0.optimizer.lr=2e-4", "write it in this form"))
            continue
        value = read_yaml(text, place, numbered=False)
        path, problem = _set(document.tree, dotted.split("."), value.tree)
        expand_shorthands(document.tree)
        for stale in [known for known in document.places if known[: len(path)] == path]:
            del document.places[stale]
        document.places.update({(*path, *below): where for below, where in value.places.items()})
        for depth in range(1, len(path)):  # of sections that it made
            document.places.setdefault(path[:depth], place)
        problems += [Problem((*path, *bad.path), bad.got, bad.allowed, bad.change) for bad in value.problems]
        if problem is not None:
            problems.append(problem)
    return problems


def expand_shorthands(tree: Mapping[str, Any]) -> None:
    """Turns bare kinds among a tree's objectives and evaluation tasks into ``{kind: ...}``, in place.

    Likewise ``parallel: auto``, of the plan or of a stage, into ``{host: auto}``.
    """
    stages = tree.get("stages")
    _expand_parallel(tree)
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict):
            continue
        _expand_parallel(stage)
        evaluate = stage.get("evaluate")
        curve = evaluate.get("curve") if isinstance(evaluate, dict) else None
        for holder, key in ((stage, "objectives"), (evaluate, "tasks"), (curve, "tasks")):
            if isinstance(holder, dict) and isinstance(holder.get(key), list):
                holder[key] = [{"kind": entry} if isinstance(entry, str) else entry for entry in holder[key]]
            _expand_filters(holder.get(key) if isinstance(holder, dict) else None)
        _expand_filters(stage.get("data"))


def _expand_parallel(holder: Any) -> None:
    if isinstance(holder, dict) and holder.get("parallel") == AUTO:
        holder["parallel"] = {"host": AUTO}


def _expand_filters(entries: Any) -> None:
    """Turns numbers, true and false in the filters of data entries and tasks into texts, and one value into a list."""
    for entry in entries if isinstance(entries, list) else []:
        where = entry.get("where") if isinstance(entry, dict) else None
        if not isinstance(where, dict):
            continue
        for name, values in where.items():
            listed = values if isinstance(values, list) else [values]
            if all(isinstance(value, str | int | float) for value in listed):
                where[name] = [value if isinstance(value, str) else json.dumps(value) for value in listed]


def _set(tree: dict[str, Any], parts: Sequence[str], value: Any) -> tuple[Path, Problem | None]:
    """Sets ``value`` below ``tree``; returns the path with indexes for names, and what kept it from being set."""
    node: Any = tree
    path: Path = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        key: str | int
        if isinstance(node, list):
            index = member_index(node, part)
            if index is None:
                known = _member_names(node)
                allowed = f"an index up to {len(node) - 1}" if node else "nothing, the list is empty"
                allowed += f", or {', '.join(map(repr, known))}" if known else ""
                change = did_you_mean(part, known, "name a member of the list")
                return (*path, part), Problem((*path, part), f"{part!r}, which is no member", allowed, change)
            key = index
        elif isinstance(node, dict):
            key = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            change = f"end the override at {parts[depth - 1]}="
            return (*path, part), Problem(
                (*path, part), f"a path into {show_value(node)}", "a section or a list", change
            )
        path = (*path, key)
        if last:
            node[key] = value
        else:
            node = node[key]
    return path, None


def member_index(members: Sequence[Any], part: str) -> int | None:
    """The member of a list that a part of an override's path names: by its index, its ``name`` or its ``kind``.

    Args:
        members: Mappings, or what has been made of them.
        part: The part.

    Returns:
        The first such member's index; None where there is none.
    """
    if part.isdecimal() and part.isascii():
        return int(part) if len(part) <= len(str(len(members))) and int(part) < len(members) else None
    for index, member in enumerate(members):
        own = member if isinstance(member, Mapping) else getattr(member, "__dict__", {})
        if part in (own.get("name"), own.get("kind")):
            return index
    return None


def _member_names(members: Sequence[Any]) -> list[str]:
    named = [member.get("name", member.get("kind")) for member in members if isinstance(member, Mapping)]
    return [name for name in named if isinstance(name, str)]
