"""What a plan would have a run do beyond reading named files, and whether the plan's author may ask for it.

A source may be a shell's command (``pipe:``), an address that is fetched, or a glob over the files of whoever runs the
plan. In a plan of one's own that is one's own wish; in one that another user wrote it has to be allowed. Every command
that opens sources of a plan, or writes a job that will, asks here.
"""

import dataclasses
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import PlanError
from engine.plan.overrides import member_index
from engine.plan.paths import expanded
from engine.plan.plan import Plan
from engine.plan.yaml import read_yaml
from omnivl.data.sources.opening import is_stream, scheme_of
from omnivl.data.sources.patterns import is_glob
from omnivl.tasks import TaskConfig

_ROOT = 0

_Place = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a file asks for that is more than reading files by name.

    Attributes:
        path: The field.
        source: Its value: a source, or a command.
        does: What it does, such as ``runs a command``.
    """

    path: str
    source: str
    does: str

    def __str__(self) -> str:
        return f"{self.path} {self.does}: {self.source!a}"


def reaches(asked: Plan | Sequence[TaskConfig], overrides: Sequence[str] = ()) -> list[Reach]:
    """The sources of training and evaluation that run a command, fetch an address or expand a glob.

    Args:
        asked: A plan, or the tasks of an evaluation.
        overrides: What the user wrote on the command line, ``path=value`` each. A source is left out if one of them
            writes this very source at its field, or at what contains the field.

    Raises:
        DataError: A brace pattern stands for too many files.
    """
    root = asked if isinstance(asked, Plan) else _Tasks(tuple(asked))
    written = [read for override in overrides if (read := _read_override(override)) is not None]
    found = []
    for place, source in _sources(root, ()):
        if is_stream(source):
            does = "runs a command" if scheme_of(source) == "pipe" else "is fetched from elsewhere"
        elif is_glob(source):
            does = "reads whatever files match"
        else:
            continue
        if not any(_value_for(root, place, *one) == source for one in written):
            found.append(Reach(_dotted(root, place), source, does))
    return found


def require_consent(
    asked: Plan | Sequence[TaskConfig], files: Sequence[Path], overrides: Sequence[str] = (), *, allowed: bool
) -> None:
    """Refuses sources of a file of another user that run a command, fetch an address or expand a glob.

    Args:
        asked: What the files and the overrides say: a plan, or the tasks of an evaluation.
        files: The plan, and what else has set its fields.
        overrides: What the user wrote on the command line.
        allowed: Whether the user allows all of it.

    Raises:
        PlanError: Names every such source.
    """
    if not allowed and any(map(_is_foreign, files)):
        refuse_foreign(reaches(asked, overrides), files, allowed=allowed)


def refuse_foreign(found: Sequence[Reach], files: Sequence[Path], *, allowed: bool) -> None:
    """Refuses what files ask for if one of them is neither this user's nor root's.

    Args:
        found: What they ask for.
        files: The files.
        allowed: Whether the user allows it.

    Raises:
        PlanError: Names everything that they ask for.
    """
    foreign = next((file for file in files if _is_foreign(file)), None)
    if allowed or foreign is None or not found:
        return
    whose = ", ".join(map(_user_name, sorted(_owners(foreign) - {os.geteuid(), _ROOT}))) or "nobody, since it is gone"
    raise PlanError(
        [
            f"{foreign}: {one.path}: got {one.source!a}, which {one.does}, in a file of user {whose}; allowed in a "
            "file of your own; read it, and add --allow-commands if you trust it"
            for one in found
        ]
    )


@dataclasses.dataclass(frozen=True)
class _Tasks:
    """The tasks of an evaluation, under the name that they have in overrides."""

    tasks: tuple[TaskConfig, ...]


def _sources(value: object, place: _Place) -> Iterator[tuple[_Place, str]]:
    """All fields called ``source`` below a value, with their places: names of fields, indexes of members."""
    for key, inner in _children(value):
        if key == "source" and isinstance(inner, str):
            yield (*place, key), inner
        else:
            yield from _sources(inner, (*place, key))


def _children(value: object) -> Iterator[tuple[str | int, object]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())


def _dotted(root: object, place: _Place) -> str:
    """A place as overrides write it; members of a list by name where they have one."""
    words, node = [], root
    for key in place:
        node = dict(_children(node))[key]
        name = getattr(node, "name", None)
        words.append(name if isinstance(key, int) and isinstance(name, str) else str(key))
    return ".".join(words)


def _read_override(override: str) -> tuple[list[str], Any] | None:
    """An override's path and value; None for what is no override."""
    dotted, equals, text = override.partition("=")
    return (dotted.split("."), read_yaml(text, "override", numbered=False).tree) if equals else None


def _value_for(root: object, place: _Place, parts: Sequence[str], value: object) -> object:
    """What an override writes at a place; None where it writes something else, or nothing there."""
    if len(parts) > len(place):
        return None
    node = root
    for key, part in zip(place, parts, strict=False):
        members = dict(_children(node))
        if key != (member_index(list(members.values()), part) if isinstance(key, int) else part):
            return None
        node = members[key]
    for key in place[len(parts) :]:
        if isinstance(value, dict) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int):
            value = value[key] if key < len(value) else None
        else:
            return None
    return expanded(value) if isinstance(value, str) else None


def _is_foreign(file: Path) -> bool:
    return not _owners(file) <= {os.geteuid(), _ROOT} or not _owners(file)


def _owners(file: Path) -> set[int]:
    """Who owns a file, and the link to it where it is one; nobody of a file that is gone."""
    try:
        return {file.stat().st_uid, file.lstat().st_uid}
    except OSError:
        return set()


def _user_name(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name!r} ({number})"
    except KeyError:
        return str(number)
