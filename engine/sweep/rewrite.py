"""Sweeps whose axes and overrides name fields of earlier spelling, rewritten into today's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from engine.plan.edits import Source, is_alias, show
from engine.plan.rewrite import Change, Rewritten, filling_changes, kind_of, model_changes, rewritten
from engine.plan.yaml import Path, Problem, read_yaml
from engine.sweep.config import Sweep, parse_sweep
from moe.upgrades import MOVED
from omnivl.architectures.upgrades import KINDS, successor


def rewrite_sweep(text: str, path: FilePath) -> Rewritten:
    """Brings a sweep's earlier fields into today's form; its runs keep their names and plans.

    Args:
        text: The sweep.
        path: Its file.

    Raises:
        PlanError: The sweep or a plan of it has mistakes, or fields that cannot be rewritten without changing a run.
    """
    before = parse_sweep(text, path)
    document = read_yaml(text, str(path))
    base = read_yaml(before.base.read_text(encoding="utf-8")).tree.get("model", {})
    overrides = document.tree.get("overrides", {})
    fields = _Fields(Source(text), _kind({**_flat(base), **overrides}), base.get("ffn"))
    changes = list(_changes(fields, document.node, document.tree))
    return rewritten(document, text, changes, lambda result: _runs(parse_sweep(result, path)) == _runs(before))


def _runs(sweep: Sweep) -> list[tuple[Any, ...]]:
    return [(point.name, point.plan, point.nodes) for point in sweep.points]


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in model.items()}


def _kind(overrides: Mapping[str, Any]) -> str:
    """The architecture's kind among overrides of a plan's model."""
    return kind_of(
        {name: overrides[f"model.{name}"] for name in ("kind", "architecture") if f"model.{name}" in overrides}
    )


@dataclass(frozen=True)
class _Fields:
    """Earlier fields among overrides.

    Attributes:
        source: The text.
        kind: The architecture's, where overrides name none.
        ffn: The base plan's filling.
    """

    source: Source
    kind: str
    ffn: Any

    def of(self, path: Path, node: yaml.Node, given: Mapping[str, Any]) -> Iterator[Change]:
        """Earlier fields of a mapping from fields to values."""
        named = {"model.kind", "model.architecture"} & given.keys()
        kind = _kind(given) if named else self.kind
        for key, value in node.value:
            at, parts = (*path, key.value), key.value.split(".")
            if "model" not in parts[:3]:
                continue
            below = parts[parts.index("model") + 1 :]
            if not below:
                yield from model_changes(self.source, at, value, given[key.value], kind, self.ffn)
            elif below == ["ffn"]:
                yield from filling_changes(self.source, at, value, given[key.value], self.ffn)
            elif (name := self.today(key.value, kind)) != key.value:
                edits = [(key.start_mark.index, key.end_mark.index, name)]
                said = f"is {name} today"
                if below == ["architecture"] and given[key.value] in KINDS and not is_alias(key, value):
                    new = show(KINDS[given[key.value]])
                    edits.append((value.start_mark.index, value.end_mark.index, new))
                yield Change(at, said, tuple(edits))

    def today(self, field: str, kind: str) -> str:
        """What a field of a plan is called today."""
        parts = field.split(".")
        if "model" not in parts[:3]:
            return field
        at = parts.index("model") + 1
        above, below = parts[:at], parts[at:]
        if len(below) > 1 and below[0] == "ffn" and below[1] in MOVED:
            return ".".join([*above, "ffn", *MOVED[below[1]], *below[2:]])
        return ".".join([*above, *(successor(one, kind) for one in below[:1]), *below[1:]])


def _changes(fields: _Fields, node: yaml.Node | None, tree: Mapping[str, Any]) -> Iterator[Change]:
    assert isinstance(node, yaml.MappingNode), "the sweep was read before"
    renamed: dict[str, str] = {}
    for key, value in node.value:
        if key.value == "overrides":
            yield from fields.of(("overrides",), value, tree["overrides"])
        elif key.value == "axes":
            for axis, entry in value.value:
                at = ("axes", axis.value)
                if isinstance(entry, yaml.MappingNode):
                    for name, part in entry.value:
                        yield from fields.of((*at, name.value), part, tree["axes"][axis.value][name.value])
                elif (name := fields.today(axis.value, fields.kind)) != axis.value:
                    renamed[axis.value] = name
                    yield _renamed_axis(at, axis, name)
    for key, value in node.value:
        if key.value == "compare" and value.value in renamed:
            edit = (value.start_mark.index, value.end_mark.index, renamed[value.value])
            yield Change(("compare",), f"names an axis that is {renamed[value.value]} today", (edit,))
        elif key.value in ("exclude", "points"):
            for index, entry in enumerate(value.value):
                for axis, _ in entry.value:
                    if axis.value in renamed:
                        yield _renamed_axis((key.value, index, axis.value), axis, renamed[axis.value])


def _renamed_axis(path: Path, axis: yaml.Node, name: str) -> Change:
    """An axis of one field's values: the last part of the field is in the names of its runs, and has to stay."""
    last = axis.value.rpartition(".")[2]
    said = f"is {name} today"
    if name.rpartition(".")[2] == last:
        return Change(path, said, ((axis.start_mark.index, axis.end_mark.index, name),))
    problem = Problem(
        path,
        "an axis whose runs are named for a field of earlier spelling",
        "one whose rewriting keeps their names",
        f"write an axis {last!r} of named values, each with {name}",
    )
    return Change(path, said, problem=problem)
