"""The file of a shard's index: plain arrays in a ``.safetensors`` file, beside the shard or in another folder.

It is built anew when the shard's size or times of change, or ``INDEX_VERSION``, differ, and when the file was not made
by this user (``omnivl.data.signed_file``).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omnivl.data.index import ShardIndex, absent_index, build_index
from omnivl.data.metadata import FieldColumn, FieldColumns
from omnivl.data.signed_file import read_signed, write_signed
from omnivl.data.sources.base import Rejection

INDEX_VERSION = 6

_ARRAYS = ("media", "text", "is_clip", "sizes", "members")
_SMALLEST_LIMIT = 1 << 20  # bytes of an index file that are read whatever the shard's size
_LARGEST_RATIO = 4  # of the index file's size to the shard's


def load_index(path: Path, name: str, cache: Path | None) -> ShardIndex:
    """The index of a shard, read from ``cache`` if it fits the shard and is the user's own, else built and written.

    Args:
        path: The tar file.
        name: How messages call it.
        cache: The index file; None keeps none. If the folder is not writable, the index is built at every start.
    """
    try:
        stamp = _stamp(path)
    except OSError as error:
        return absent_index(name, error.strerror or str(error))
    cached = None if cache is None else _read_cache(cache, stamp)
    if cached is not None:
        return cached
    index = build_index(path, name)
    unreadable = any(rejection.cause == "unreadable_path" for rejection in index.rejections)
    if cache is not None and not unreadable:
        _write_cache(cache, stamp, index)
    return index


def glance_at_index(
    path: Path, name: str, cache: Path | None, enough: Callable[[int], bool]
) -> tuple[ShardIndex, bool]:
    """The index of a shard if there is one, else that of its beginning; nothing is written.

    Args:
        path: The tar file.
        name: How messages call it.
        cache: See ``load_index``.
        enough: See ``build_index``.

    Returns:
        The index, and whether it is that of the whole shard.
    """
    try:
        stamp = _stamp(path)
    except OSError as error:
        return absent_index(name, error.strerror or str(error)), True
    cached = None if cache is None else _read_cache(cache, stamp)
    if cached is not None:
        return cached, True
    stopped: list[bool] = []

    def stop(samples: int) -> bool:
        if enough(samples):
            stopped.append(True)
        return bool(stopped)

    index = build_index(path, name, stop)
    return index, not stopped


def _stamp(path: Path) -> NDArray[np.int64]:
    """What an index is compared with: the version of its form, and the shard's size and times of change."""
    status = path.stat()
    return np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns, status.st_ctime_ns], dtype=np.int64)


def _read_cache(cache: Path, stamp: NDArray[np.int64]) -> ShardIndex | None:
    stored = read_signed(cache, max(_SMALLEST_LIMIT, _LARGEST_RATIO * int(stamp[1])))
    if stored is None:
        return None
    try:
        if not np.array_equal(stored["stamp"], stamp):
            return None
        text = json.loads(bytes(stored["json"]))
        return ShardIndex(
            keys=tuple(text["keys"]),
            media=stored["media"],
            text=stored["text"],
            extension=tuple(text["extension"]),
            is_clip=stored["is_clip"],
            sizes=stored["sizes"],
            labels=tuple(text["labels"]),
            fields=_read_fields(text["fields"], stored, len(text["keys"])),
            member_names=tuple(text["member_names"]),
            members=stored["members"],
            rejections=tuple(Rejection(*entry) for entry in text["rejections"]),
        )
    except (ValueError, KeyError, TypeError):
        return None  # of another version: it is built again


def _read_fields(
    stored_fields: Mapping[str, tuple[list[str] | None, int, int]], stored: Mapping[str, NDArray[Any]], length: int
) -> FieldColumns:
    """The columns, which lie one behind the other in three arrays."""
    columns: dict[str, FieldColumn] = {}
    row = code = number = 0
    for name, (values, rows, numbers) in stored_fields.items():
        codes = 0 if values is None else rows
        columns[name] = FieldColumn(
            rows=stored["field_rows"][row : row + rows],
            values=None if values is None else tuple(values),
            codes=stored["field_codes"][code : code + codes],
            numbers=stored["field_numbers"][number : number + numbers],
        )
        row, code, number = row + rows, code + codes, number + numbers
    return FieldColumns(columns, length)


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])


def _write_cache(cache: Path, stamp: NDArray[np.int64], index: ShardIndex) -> None:
    columns = index.fields.columns
    text = {
        "keys": index.keys,
        "extension": index.extension,
        "labels": index.labels,
        "member_names": index.member_names,
        "fields": {name: (one.values, len(one.rows), len(one.numbers)) for name, one in columns.items()},
        "rejections": [(entry.cause, entry.where, entry.detail) for entry in index.rejections],
    }
    arrays: dict[str, NDArray[Any]] = {name: getattr(index, name) for name in _ARRAYS}
    arrays |= {
        "stamp": stamp,
        "json": np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
        "field_rows": _joined([one.rows for one in columns.values()], np.int32),
        "field_codes": _joined([one.codes for one in columns.values()], np.int32),
        "field_numbers": _joined([one.numbers for one in columns.values()], np.float64),
    }
    write_signed(cache, arrays)
