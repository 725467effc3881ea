"""Expands a source's pattern to shards."""

import glob
import os
from itertools import islice
from pathlib import Path

from omnivl.data.formats import MEDIA_EXTENSIONS
from omnivl.data.sources.braces import MAX_SHARDS, expand_braces, too_many_shards
from omnivl.data.sources.opening import check_address, scheme_of
from omnivl.errors import DataError

_LOOKED_AT = 10_000  # entries of a folder without shards, to say what it holds


def expand_pattern(pattern: str) -> tuple[str, ...]:
    """Expands ``{000..127}`` and ``{a,b}``, then ``*`` and ``?``; a folder stands for its tar files. Sorted by name.

    What exists by its very name is taken as it is, also with brackets or braces in it.

    Raises:
        DataError: Nothing matches, it is an address, or it names more than ``MAX_SHARDS`` files.
    """
    if not pattern.strip() or "\0" in pattern:
        raise DataError(f"data source {pattern!r}: no name; give a .tar file, a folder, a glob or a brace pattern")
    if scheme_of(pattern) is not None:
        check_address(pattern)
    paths: list[str] = []
    for text in [pattern] if _exists(pattern) else expand_braces(pattern):
        if Path(text).is_dir():
            inside = sorted(str(path) for path in Path(text).rglob("*.tar"))
            paths += inside if inside or text == pattern else [text]  # empty, one of several: an unreadable shard
        elif _has_wildcard(text):
            paths += sorted(islice(glob.iglob(text), MAX_SHARDS + 1))  # noqa: PTH207  # Path.glob: no absolute patterns
        else:
            paths.append(text)
    if not paths:
        raise DataError(
            f"data source {pattern!r}: no shard matches; allowed: a .tar file, a folder with .tar files, a glob or a "
            f"brace pattern such as data/{{000..127}}.tar; the working folder is {Path.cwd()}{_why_nothing(pattern)}"
        )
    if len(paths) > MAX_SHARDS:
        raise DataError(too_many_shards(pattern))
    return tuple(paths)


def is_glob(pattern: str) -> bool:
    """Whether a pattern reads whatever files match it. What exists by its very name is no glob, also with brackets.

    Raises:
        DataError: It names more than ``MAX_SHARDS`` files.
    """
    if not glob.has_magic(pattern) or _exists(pattern):
        return False
    return any(_has_wildcard(text) for text in expand_braces(pattern))


def _has_wildcard(path: str) -> bool:
    return glob.has_magic(path) and not _exists(path)


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)  # a name that is too long, or holds a null byte, is none
    except ValueError:
        return False


def _why_nothing(pattern: str) -> str:
    """What a folder without shards holds, or how brackets are read."""
    if Path(pattern).is_dir():
        found = islice(Path(pattern).rglob("*"), _LOOKED_AT)
        media = next((path for path in found if path.suffix.lower().removeprefix(".") in MEDIA_EXTENSIONS), None)
        if media is not None:
            return (
                f". The folder holds files such as {media.relative_to(pattern)}: make shards of them with omnivl data "
                f"convert folder {pattern} --out SHARDS"
            )
        return ". The folder holds no file that ends with .tar"
    if "[" in pattern:
        return ". In a glob [ab] stands for one letter, a or b; write [[] for a bracket"
    return ""
