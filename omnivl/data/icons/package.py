"""The npm package of all icon sets: where it comes from, and what is in it."""

import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omnivl.data.emoji.iconify import is_name
from omnivl.data.emoji.join import read_json
from omnivl.data.emoji.packages import Package, fetch_package
from omnivl.data.icons.sets import SetInfo, read_set_info
from omnivl.errors import DataError

ICONS = Package("@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91")

_FOLDER, _SUFFIX = "package/json/", ".json"
_LARGEST_SET = 1 << 29  # bytes of one set's JSON; the largest has 104 MB


def find_package(place: Path | None, cache: Path) -> Path:
    """The package's archive.

    Args:
        place: The archive, which is taken as it is; or a folder that has it; None downloads it with ``npm pack`` into
            ``cache`` if it is not there yet. In a folder it is that version whose hash is known.
        cache: Folder for the download.

    Raises:
        DataError: It is missing, differs from the known one, or cannot be fetched.
    """
    if place is not None and place.is_file():
        return place
    if place is not None and not place.is_dir():
        raise DataError(f"{place} does not exist; name the archive, its folder, or leave it out to have it downloaded")
    return fetch_package(ICONS, place, cache)


def read_infos(archive: Path) -> dict[str, SetInfo]:
    """What the package says of its sets, by prefix.

    Raises:
        DataError: It is no npm archive of icon sets.
    """
    try:
        entries = read_json(archive, "package/collections.json")
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, DataError):
            raise DataError(f"{archive}: no package/collections.json; name an archive of {ICONS.name}") from error
        raise DataError(f"{archive}: {error}; name an archive of {ICONS.name}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{archive}: package/collections.json is a {type(entries).__name__}; allowed: an object")
    return {
        prefix: read_set_info(prefix, info)
        for prefix, info in sorted(entries.items())
        if is_name(prefix) and isinstance(info, dict)
    }


def iterate_sets(archive: Path, wanted: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Yields (prefix, JSON of the set) in the archive's order; instead of the JSON, a text that says what is wrong.

    Sets that are not wanted are not read. Those that the archive lacks come last.

    Args:
        archive: The package.
        wanted: Prefixes.

    Raises:
        DataError: The archive ends early.
    """
    missing = set(wanted)
    if not missing:
        return
    try:
        with tarfile.open(archive, "r|gz") as members:  # one pass: it has half a gigabyte
            for member in members:
                prefix = member.name[len(_FOLDER) : -len(_SUFFIX)]
                if member.name != f"{_FOLDER}{prefix}{_SUFFIX}" or prefix not in missing:
                    continue
                missing.remove(prefix)
                file = members.extractfile(member) if member.size <= _LARGEST_SET else None
                yield prefix, f"its file has {member.size} bytes" if file is None else _parsed(file.read())
                if not missing:
                    return
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive}: {error}; fetch it again with 'npm pack {ICONS.name}'") from error
    yield from ((prefix, f"no {_FOLDER}{prefix}{_SUFFIX}") for prefix in sorted(missing))


def _parsed(data: bytes) -> Mapping[str, Any] | str:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        return f"its JSON: {error}"
    return tree if isinstance(tree, dict) else f"its JSON is a {type(tree).__name__}, no object"
