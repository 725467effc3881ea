"""Tar files for tests."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

Members = Mapping[str, bytes] | Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members, mode: Literal["w", "w:gz"] = "w") -> Path:
    """Writes names with contents in their order, names also several times; returns the path."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path
