"""The values that the plan's dataclasses allow, from their annotations, for error messages and the plan's reference."""

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.plan.yaml import Path, show_value
from moe.ranges import AUTO, Range

_SCALARS: Mapping[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def field_types(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass's fields, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(cls)}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, flattened; anything else alone."""
    return tuple(member for member, _ in _bounded_members(annotation))


def range_of(annotation: Any) -> Range | None:
    """The range of the numbers that may stand in a field; None for any, or for no numbers."""
    return next((bounds for _, bounds in _bounded_members(annotation) if bounds is not None), None)


def describe_range(annotation: Any) -> str:
    """The range of a field's numbers in words, and what may stand there beside a number: ``1 or more, or 'auto'``."""
    others = [_describe_one(member, None) for member in members(annotation) if member not in (int, float)]
    return ", or ".join([str(range_of(annotation)), *others])


def _bounded_members(annotation: Any, bounds: Range | None = None) -> Iterator[tuple[Any, Range | None]]:
    """The alternatives of a union, each with the range that its annotation gives it."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        if AUTO in metadata:
            yield Literal["auto"], None
        yield from _bounded_members(inner, next((entry for entry in metadata if isinstance(entry, Range)), bounds))
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _bounded_members(part, bounds)
    else:
        yield annotation, bounds


def kinds(annotation: Any) -> dict[str, type]:
    """The dataclasses of a union by the one ``kind`` that each has; empty where they have none."""
    found = {}
    for member in members(annotation):
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            values = get_args(field_types(member).get("kind"))
            if len(values) == 1:
                found[values[0]] = member
    return found


def describe(annotation: Any, section: Callable[[type], str] | None = None) -> str:
    """The allowed values of a field, in words.

    Args:
        annotation: The field's annotation.
        section: How to name a dataclass, for the reference, which gives the ranges of numbers as well; "a mapping"
            where not given.
    """
    known = kinds(annotation)
    parts: list[str] = []
    if known and section is None:
        parts.append(f"a mapping with kind {_any_of(list(known))}")
    for member, bounds in _bounded_members(annotation):
        if section is None and member in known.values():
            continue
        shown = "" if section is None or bounds is None or member not in (int, float) else f" ({bounds})"
        parts.append(_describe_one(member, section) + shown)
    return _joined(list(dict.fromkeys(parts)))


def choices(annotation: Any) -> tuple[str, ...]:
    """Strings that a field allows: those among its literals."""
    return tuple(
        value
        for member in members(annotation)
        if get_origin(member) is Literal
        for value in get_args(member)
        if isinstance(value, str)
    )


def annotation_at(annotation: Any, tree: Any, path: Path) -> Any:
    """The annotation of the value at ``path``, unions resolved by the tree's ``kind``; None if unknown."""
    for part in path:
        annotation = _step(annotation, tree, part)
        if annotation is None:
            return None
        tree = _child(tree, part)
    return annotation


def dataclass_at(annotation: Any, tree: Any) -> type | None:
    """The dataclass that a mapping is read as; None where the annotation has none or the kind is unknown."""
    known = kinds(annotation)
    kind = tree.get("kind") if isinstance(tree, Mapping) else None
    if isinstance(kind, str) and kind in known:
        return known[kind]
    classes = [member for member in members(annotation) if dataclasses.is_dataclass(member)]
    return classes[0] if len(classes) == 1 and isinstance(classes[0], type) else None


def _step(annotation: Any, tree: Any, part: str | int) -> Any:
    if (cls := dataclass_at(annotation, tree)) is not None and isinstance(part, str):
        return field_types(cls).get(part)
    for member in members(annotation):
        arguments = get_args(member)
        if get_origin(member) is tuple and isinstance(part, int):
            if arguments[-1] is Ellipsis:
                return arguments[0]
            return arguments[part] if part < len(arguments) else None
        if isinstance(get_origin(member), type) and issubclass(get_origin(member), Mapping):
            return arguments[1]
    return None


def _child(tree: Any, part: str | int) -> Any:
    if isinstance(tree, Mapping):
        return tree.get(part)
    if isinstance(tree, list) and isinstance(part, int) and part < len(tree):
        return tree[part]
    return None


def _describe_one(member: Any, section: Callable[[type], str] | None) -> str:
    if member in _SCALARS:
        return _SCALARS[member]
    origin, arguments = get_origin(member), get_args(member)
    if origin is Literal:
        return _any_of(list(arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {describe(arguments[0], section)}"
        return (
            f"a list of {len(arguments)}, each {_joined(list(dict.fromkeys(describe(a, section) for a in arguments)))}"
        )
    if dataclasses.is_dataclass(member) and isinstance(member, type):
        return section(member) if section is not None else "a mapping"
    assert issubclass(origin, Mapping), f"no words for {member}"
    return f"a mapping of names to {describe(arguments[1], section)}"


def _any_of(values: list[Any]) -> str:
    return _joined([show_value(value) for value in values])


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
