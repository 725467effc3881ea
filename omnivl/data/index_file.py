"""The file of a shard's index: plain arrays in a ``.safetensors`` file, beside the shard or in another folder.

It is built anew when the shard's size or time of change, or ``INDEX_VERSION``, differ. (Not as ``.npz``: NumPy reads an
array's header with ``ast.literal_eval``, and several threads at that at once end in a SystemError on Python 3.11.)
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from omnivl.data.index import ShardIndex, absent_index, build_index
from omnivl.data.sources.base import Rejection

INDEX_VERSION = 3


def load_index(path: Path, name: str, cache: Path | None) -> ShardIndex:
    """The index of a shard, read from ``cache`` if it fits the shard, else built and written there.

    Args:
        path: The tar file.
        name: How messages call it.
        cache: The index file; None keeps none. If the folder is not writable, the index is built at every start.
    """
    try:
        status = path.stat()
    except OSError as error:
        return absent_index(name, error.strerror or str(error))
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    cached = None if cache is None else _read_cache(cache, stamp)
    if cached is not None:
        return cached
    index = build_index(path, name)
    unreadable = any(rejection.cause == "unreadable_path" for rejection in index.rejections)
    if cache is not None and not unreadable:
        _write_cache(cache, stamp, index)
    return index


def _read_cache(cache: Path, stamp: NDArray[np.int64]) -> ShardIndex | None:
    try:
        stored = load_file(cache)
        if not np.array_equal(stored["stamp"], stamp):
            return None
        text = json.loads(bytes(stored["json"]))
        fields = {
            name: (tuple(values), stored[f"field{number}"])
            for number, (name, values) in enumerate(text["fields"].items())
        }
        return ShardIndex(
            keys=tuple(text["keys"]),
            media=stored["media"],
            text=stored["text"],
            extension=tuple(text["extension"]),
            is_clip=stored["is_clip"],
            labels=tuple(text["labels"]),
            fields=fields,
            member_names=tuple(text["member_names"]),
            members=stored["members"],
            rejections=tuple(Rejection(*entry) for entry in text["rejections"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None  # absent, damaged or foreign: it is built again


def _write_cache(cache: Path, stamp: NDArray[np.int64], index: ShardIndex) -> None:
    text = {
        "keys": index.keys,
        "extension": index.extension,
        "labels": index.labels,
        "member_names": index.member_names,
        "fields": {name: values for name, (values, _) in index.fields.items()},
        "rejections": [(entry.cause, entry.where, entry.detail) for entry in index.rejections],
    }
    columns: dict[str, Any] = {f"field{number}": codes for number, (_, codes) in enumerate(index.fields.values())}
    names = ("media", "text", "is_clip", "members")
    arrays: dict[str, Any] = {name: getattr(index, name) for name in names}
    encoded = np.frombuffer(json.dumps(text).encode(), dtype=np.uint8)
    temporary: str | None = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{cache.name}.", dir=cache.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(save({"stamp": stamp, "json": encoded, **arrays, **columns}))
        os.replace(temporary, cache)  # noqa: PTH105  # atomic: another process sees the old or the new one
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
