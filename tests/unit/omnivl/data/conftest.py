"""Small shards for the tests of the data side."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tar_files
from tar_files import Members


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes members, in order, into a tar file."""

    def write(members: Members, name: str = "shard.tar") -> Path:
        return tar_files.write_tar(tmp_path / name, members)

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
