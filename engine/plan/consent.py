"""What a plan would have a run do beyond reading named files, and whether the plan's author may ask for it.

A source may be a shell's command (``pipe:``), an address that is fetched, or a glob over the files of whoever runs the
plan. In a plan of one's own that is one's own wish; in one that another user wrote it has to be allowed.
"""

import dataclasses
import glob
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engine.errors import PlanError
from engine.plan.plan import Plan
from omnivl.data.sources.opening import is_stream, scheme_of

_ROOT = 0


@dataclasses.dataclass(frozen=True)
class Reach:
    """A source that does more than read files by name.

    Attributes:
        path: Its field in the plan.
        source: The source.
        does: What it does, such as ``runs a command``.
    """

    path: str
    source: str
    does: str

    def __str__(self) -> str:
        return f"{self.path} {self.does}: {self.source!a}"


def reaches(plan: Plan) -> list[Reach]:
    """The sources of training and evaluation that run a command, fetch an address or expand a glob, each once."""
    found: dict[str, Reach] = {}
    for path, source in _sources(plan, ""):
        if is_stream(source):
            does = "runs a command" if scheme_of(source) == "pipe" else "is fetched from elsewhere"
        elif glob.has_magic(source):
            does = "reads whatever files match"
        else:
            continue
        found.setdefault(source, Reach(path, source, does))
    return list(found.values())


def require_consent(plan: Plan, files: Sequence[Path], overrides: Sequence[str] = ()) -> None:
    """Refuses a plan of another user whose sources run a command, fetch an address or expand a glob.

    A file that does not exist, and one of root, are nobody's wish against the user's. A source that an override names
    is the user's own.

    Args:
        plan: What the files and the overrides say.
        files: The plan, and what else has set its fields.
        overrides: What the user wrote on the command line.

    Raises:
        PlanError: Names every such source.
    """
    foreign = [(file, owner) for file in files if (owner := _owner(file)) not in (None, os.geteuid(), _ROOT)]
    if not foreign:
        return
    file, owner = foreign[0]
    asked = [one for one in reaches(plan) if not any(one.source in override for override in overrides)]
    if asked:
        raise PlanError(
            [
                f"{file}: {one.path}: got {one.source!a}, which {one.does}, in a file of user {_user_name(owner)}; "
                "allowed in a file of your own; read it, and add --allow-commands if you trust it"
                for one in asked
            ]
        )


def _sources(value: object, path: str) -> Iterator[tuple[str, str]]:
    """All fields called ``source`` below a value, with their paths; members of a list by name where they have one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            inner, place = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
            if field.name == "source" and isinstance(inner, str):
                yield place, inner
            else:
                yield from _sources(inner, place)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _sources(inner, f"{path}.{getattr(inner, 'name', None) or number}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _sources(inner, f"{path}.{key}")


def _owner(file: Path) -> int | None:
    try:
        return file.stat().st_uid
    except OSError:
        return None


def _user_name(number: int | None) -> str:
    try:
        return f"{pwd.getpwuid(number or 0).pw_name!r} ({number})"
    except KeyError:
        return str(number)
