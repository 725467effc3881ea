"""Writes files so that they are on the disk when the function returns, and reads those that may be damaged."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict, TypeVar

from engine.errors import RunFileError
from omnivl.data.plain_files import open_plain
from omnivl.errors import reason_of

Container = TypeVar("Container", dict, list)  # type: ignore[type-arg]

_CHUNK = 1 << 24
"""Bytes that are hashed and written at a time."""


class FileRecord(TypedDict):
    """Entry of a file in a manifest.

    Attributes:
        bytes: Its size.
        sha256: Its hash, hexadecimal.
    """

    bytes: int
    sha256: str


def write_synced(path: Path, contents: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes a file, hashed on the way, and waits until it is on the disk.

    Args:
        path: Replaced where it exists.
        contents: Its parts in their order; taken one at a time.

    Raises:
        OSError: It could not be written.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in contents:
            view = memoryview(part).cast("B")
            for begin in range(0, len(view), _CHUNK):
                left = view[begin : begin + _CHUNK]
                digest.update(left)
                size += len(left)
                while len(left) > 0:  # an unbuffered write may take a part only
                    left = left[file.write(left) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


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


def sha256(path: Path) -> str:
    """The hash of a regular file, hexadecimal."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
