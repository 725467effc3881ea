"""Small shards for the tests of the data side."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

Members = Iterable[tuple[str, bytes]]


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes members, in order, into a tar file."""

    def write(members: Members, name: str = "shard.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as archive:
            for member, data in members:
                header = tarfile.TarInfo(member)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def png() -> bytes:
    return picture(".png")


def picture(extension: str, width: int = 12, height: int = 8, value: int = 200) -> bytes:
    done, data = cv2.imencode(extension, np.full((height, width, 3), value, dtype=np.uint8))
    assert done
    return bytes(data)


@pytest.fixture(scope="session")
def encode_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def pairs(png: bytes) -> Callable[..., list[tuple[str, bytes]]]:
    """Members of ``count`` good samples ``0000.png`` + ``0000.json``."""

    def make(count: int, **fields: object) -> list[tuple[str, bytes]]:
        members: list[tuple[str, bytes]] = []
        for number in range(count):
            record = {"caption": f"thing {number}", **fields}
            members += [(f"{number:04d}.png", png), (f"{number:04d}.json", json.dumps(record).encode())]
        return members

    return make
