"""Writes files so that they are on the disk when the function returns."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

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


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
