"""Writes files so that they are on the disk when the function returns, and reads those that may be damaged."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

from engine.errors import RunFileError
from omnivl.data.plain_files import open_plain
from omnivl.errors import reason_of

Container = TypeVar("Container", dict, list)  # type: ignore[type-arg]

_CHUNK = 1 << 24
"""Bytes that are hashed and written at a time."""


class FileRecord(TypedDict):
    """A file, or a range of one, in a manifest.

    Attributes:
        bytes: Its size.
        sha256: Its hash, hexadecimal.
    """

    bytes: int
    sha256: str


Contents = Iterable[bytes | memoryview]
"""The parts of a range of a file in their order; taken one at a time."""


def write_synced(path: Path, contents: Contents) -> FileRecord:
    """Writes a file, hashed on the way, and waits until it is on the disk.

    Args:
        path: Replaced where it exists.
        contents: Of the file.

    Raises:
        OSError: It could not be written.
    """
    (record,) = _write(path, [(0, contents)], 0)
    return record


def write_ranges(path: Path, ranges: Iterable[tuple[int, Contents]], size: int | None) -> list[FileRecord]:
    """Writes ranges of a file, hashed on the way, and waits until they are on the disk.

    Other processes may write other ranges of it at the same time.

    Args:
        path: Kept where it exists.
        ranges: Where each begins, and its contents.
        size: Of the whole file; None leaves it to another process to see that the file is not larger.

    Returns:
        A record of each range.

    Raises:
        OSError: They could not be written.
    """
    return _write(path, ranges, size)


def _write(path: Path, ranges: Iterable[tuple[int, Contents]], size: int | None) -> list[FileRecord]:
    records: list[FileRecord] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if size is not None and os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
        for begin, contents in ranges:
            at, digest = begin, hashlib.sha256()
            for part in contents:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), _CHUNK):
                    left = view[start : start + _CHUNK]
                    digest.update(left)
                    while len(left) > 0:  # a write may take a part only
                        written = os.pwrite(descriptor, left, at)
                        at, left = at + written, left[written:]
            records.append({"bytes": at - begin, "sha256": digest.hexdigest()})
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return records


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it; of a link to a folder, the link alone.

    Raises:
        OSError: It cannot be removed.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged_ranges(path: Path, records: Sequence[FileRecord], chosen: Iterable[int]) -> Iterator[int]:
    """Indices of the ranges of a regular file that are not as recorded.

    Args:
        path: The file.
        records: Of its ranges, which follow each other from its beginning.
        chosen: Indices of those that are read.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    begins = [0, *itertools.accumulate(record["bytes"] for record in records)]
    buffer = memoryview(bytearray(min(_CHUNK, max((record["bytes"] for record in records), default=0))))
    with open_plain(path) as file:
        for index in chosen:
            file.seek(begins[index])
            left, digest = records[index]["bytes"], hashlib.sha256()
            while left > 0 and (count := file.readinto(buffer[:left])) > 0:
                digest.update(buffer[:count])
                left -= count
            if left > 0 or digest.hexdigest() != records[index]["sha256"]:
                yield index


def read_whole(path: Path) -> bytes:
    """The content of a file of a run, whatever lies in its place: no pipe is waited for, no device read.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    with open_plain(path) as file:
        return file.read()


def read_json(path: Path, kind: type[Container], remedy: str) -> Container:
    """The content of a JSON file that a run wrote.

    Args:
        path: The file.
        kind: ``dict`` or ``list``, which is what it has to hold.
        remedy: What to do where it is cut or changed.

    Raises:
        RunFileError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFileError(f"{path}: got a file that cannot be read ({reason_of(error)}); {remedy}") from error
    if not isinstance(content, kind):
        wanted = "a mapping" if kind is dict else "a list"
        raise RunFileError(f"{path}: got {type(content).__name__}; allowed is {wanted}, as a run writes it; {remedy}")
    return content
