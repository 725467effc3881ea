"""Expands a source's pattern to shards."""

import glob
import re
from pathlib import Path

from omnivl.errors import DataError

_RANGE = re.compile(r"\{([^{}]+)\}")


def expand_pattern(pattern: str) -> tuple[str, ...]:
    """Expands ``{000..127}`` and ``{a,b}``, then ``*`` and ``?``; a folder stands for its tar files. Sorted by name.

    Raises:
        DataError: Nothing matches.
    """
    paths: list[str] = []
    for text in expand_braces(pattern):
        if Path(text).is_dir():
            inside = sorted(str(path) for path in Path(text).rglob("*.tar"))
            paths += inside if inside or text == pattern else [text]  # empty, one of several: an unreadable shard
        elif glob.has_magic(text):
            paths += sorted(glob.glob(text))  # noqa: PTH207  # Path.glob takes no absolute patterns
        else:
            paths.append(text)
    if not paths:
        raise DataError(
            f"data source {pattern!r}: no shard matches; allowed: a .tar file, a folder with .tar files, a glob or a "
            f"brace pattern such as data/{{000..127}}.tar; the working folder is {Path.cwd()}"
        )
    return tuple(paths)


def expand_braces(pattern: str) -> list[str]:
    """Expands ``{000..127}`` and ``{a,b}``; anything else stays as it is."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for choice in choices for expanded in expand_braces(f"{head}{choice}{tail}")]
