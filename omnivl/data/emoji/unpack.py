"""Finds the embedded set, and unpacks its shards to plain tar files.

A tar spends 1.5 KiB of headers and padding on every picture, as much as the picture itself, so the package carries the
shards compressed. Random access needs plain ones: they are unpacked once, into a cache folder.
"""

import gzip
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from omnivl.data.cache_folder import cache_folder
from omnivl.errors import DataError

EMBEDDED = Path(__file__).parent.parent / "embedded" / "emoji"
VOCABULARY = EMBEDDED / "vocab.txt"
MANIFEST = "manifest.json"
CORE, HANDS = "emoji", "hands"
"""Parts of the set, by the beginnings of their shards' names."""


def read_manifest(folder: Path = EMBEDDED) -> dict[str, Any]:
    """The manifest of a built set.

    Raises:
        DataError: There is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing; reinstall the package, or build the set with 'omnivl data build emoji'")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


@cache
def embedded_shards(part: str = CORE) -> tuple[Path, ...]:
    """Plain tar shards of a part of the embedded set; unpacked into the cache folder on first use.

    Safe with several processes at the same time: each shard is renamed to its final name when it is complete.

    Args:
        part: ``CORE``, every concept in three styles and the clips, or ``HANDS``, the drawings of further hands.

    Raises:
        DataError: The package has no embedded set, or its shards are damaged.
    """
    shards = [shard for shard in read_manifest()["shards"] if shard["name"].startswith(f"{part}-")]
    digest = hashlib.sha256("".join(shard["tar_sha256"] for shard in shards).encode()).hexdigest()
    folder = cache_folder() / f"emoji-{digest[:16]}"
    return tuple(_unpack(shard, folder) for shard in shards)


def _unpack(shard: dict[str, Any], folder: Path) -> Path:
    packed = EMBEDDED / str(shard["name"])
    target = folder / packed.name.removesuffix(".gz")
    if target.is_file() and _digest(target.read_bytes()) == shard["tar_sha256"]:
        return target
    try:
        plain = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{packed}: {error}; reinstall the package") from error
    if _digest(plain) != shard["tar_sha256"]:
        raise DataError(f"{packed}: differs from its manifest; reinstall the package")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=target.name, delete=False) as file:
        file.write(plain)
    Path(file.name).replace(target)
    return target


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
