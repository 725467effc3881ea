"""The index of a tar shard: where each sample lies and what its metadata says.

With the offsets of all samples known, a shard is a list that can be read in any order: that makes the order of training
a pure function, without a shuffle buffer. The index is built by reading tar headers and the small text members (JSON,
txt, cls); pictures and clips are not decoded, and nothing is ever unpickled. It is kept as plain arrays in a
``.safetensors`` file beside the shard, and is built anew when the shard's size or time of change, or ``INDEX_VERSION``,
differ. (Not as ``.npz``: NumPy reads an array's header with ``ast.literal_eval``, and several threads at that at once
end in a SystemError on Python 3.11.)
"""

import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from omnivl.data.formats import CLIP_EXTENSIONS, MEDIA_EXTENSIONS, TEXT_EXTENSIONS, is_animated
from omnivl.data.record import Record, parse_record
from omnivl.data.sources.base import BadSampleError, Rejection

INDEX_VERSION = 2
MAX_VALUES = 4096  # a metadata field with more distinct values in a shard cannot be filtered by
LANGUAGES = "@languages"
_HEADER_BYTES = 64

Span = tuple[int, int]


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples as columns of equal length N.

    Attributes:
        keys: Names of the samples.
        media: int64 ``[N, 2]``: offset and size of the picture or clip.
        text: int64 ``[N, 3, 2]``: offset and size of the JSON, txt and cls members; size -1 where there is none.
        extension: Extension of each sample's media.
        is_clip: bool ``[N]``.
        labels: Class name of each sample, "" for none.
        fields: Metadata fields that can be filtered by: for each the distinct values (as JSON) and int32 ``[N]`` codes
            into them, -1 for none. ``@languages`` lists the languages of a sample's captions.
        rejections: What was found bad.
    """

    keys: tuple[str, ...]
    media: NDArray[np.int64]
    text: NDArray[np.int64]
    extension: tuple[str, ...]
    is_clip: NDArray[np.bool_]
    labels: tuple[str, ...]
    fields: Mapping[str, tuple[tuple[str, ...], NDArray[np.int32]]]
    rejections: tuple[Rejection, ...]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)


@dataclass
class _Group:
    """The members of one sample, while the headers go by."""

    key: str
    media: tuple[Span, str] | None = None
    text: dict[str, Span] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    repeated: str | None = None

    def add(self, extension: str, span: Span) -> None:
        if extension in TEXT_EXTENSIONS:
            self.repeated = extension if extension in self.text else self.repeated
            self.text.setdefault(extension, span)
        elif extension in MEDIA_EXTENSIONS:
            self.repeated = extension if self.media is not None else self.repeated
            self.media = self.media or (span, extension)
        else:
            self.unknown.append(extension)


def split_name(name: str) -> tuple[str, str]:
    """Cuts a member's name into key and extension, as WebDataset does: at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def build_index(path: Path, name: str) -> ShardIndex:
    """Reads a shard's headers and text members. Never raises for a bad shard: what is bad is in ``rejections``.

    Args:
        path: The tar file, not compressed.
        name: How messages call it.
    """
    rejections: list[Rejection] = []
    rows: list[tuple[_Group, Record, bool]] = []
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            for group in _groups(path, name, rejections):
                try:
                    rows.append(_examine(descriptor, group, f"{name}:{group.key}", seen))
                except BadSampleError as error:
                    rejections.append(error.rejection)
    except OSError as error:
        rejections.append(Rejection("unreadable_path", name, error.strerror or str(error)))
    if not rows and not rejections:
        rejections.append(Rejection("empty_shard", name, "the archive has no samples"))
    return _columns(rows, tuple(rejections))


def _groups(path: Path, name: str, rejections: list[Rejection]) -> Iterator[_Group]:
    """Neighbouring members with one key, as they lie in the archive."""
    size = path.stat().st_size
    if size == 0:
        rejections.append(Rejection("empty_shard", name, "the file has no bytes"))
        return
    group: _Group | None = None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or Path(member.name).name.startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
                key, extension = split_name(member.name)
                if group is not None and group.key != key:
                    yield group
                    group = None
                group = group or _Group(key)
                group.add(extension, (member.offset_data, member.size))
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            _check_end(path, archive.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        detail = f"{error}; the file has {size} bytes"
        rejections.append(Rejection("truncated_tar", name, detail))
        if group is not None and (group.media is None or not group.text):
            return  # the rest of it lies in the part that is lost
    if group is not None:
        yield group


def _check_end(path: Path, offset: int) -> None:
    """Whether the archive ends as one should: ``tarfile`` takes a torn or foreign header for the end.

    Raises:
        tarfile.ReadError: There is no end mark at ``offset``.
    """
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        found = "nothing" if not block else f"{len(block)} bytes that are no header"
        raise tarfile.ReadError(f"no end mark at offset {offset}, but {found}")


def _examine(descriptor: int, group: _Group, where: str, seen: set[str]) -> tuple[_Group, Record, bool]:
    """Reads a group's text members and the first bytes of its media.

    Raises:
        BadSampleError: The group is no usable sample, whatever kind is asked for.
    """
    if group.key in seen:
        raise BadSampleError("duplicate_key", where, "an earlier sample of the shard has this key")
    seen.add(group.key)
    if group.repeated is not None:
        raise BadSampleError("duplicate_key", where, f"the sample has two members for .{group.repeated}")
    if group.media is None and group.unknown:
        known = ", ".join(sorted(MEDIA_EXTENSIONS))
        raise BadSampleError("unknown_extension", where, f".{group.unknown[0]} is not read; known: {known}")
    if group.media is None:
        raise BadSampleError("missing_media", where, f"the sample has only {', '.join(sorted(group.text))}")
    (offset, size), extension = group.media
    texts = {kind: os.pread(descriptor, span[1], span[0]) for kind, span in group.text.items()}
    record = parse_record(texts, where)
    header = os.pread(descriptor, min(size, _HEADER_BYTES), offset)
    return group, record, extension in CLIP_EXTENSIONS or is_animated(header)


def _columns(rows: list[tuple[_Group, Record, bool]], rejections: tuple[Rejection, ...]) -> ShardIndex:
    media = [group.media for group, _, _ in rows]
    spans = [entry[0] for entry in media if entry is not None]
    absent = (0, -1)
    text = [[group.text.get(kind, absent) for kind in TEXT_EXTENSIONS] for group, _, _ in rows]
    return ShardIndex(
        keys=tuple(group.key for group, _, _ in rows),
        media=np.array(spans, dtype=np.int64).reshape(-1, 2),
        text=np.array(text, dtype=np.int64).reshape(-1, len(TEXT_EXTENSIONS), 2),
        extension=tuple(entry[1] for entry in media if entry is not None),
        is_clip=np.array([clip for _, _, clip in rows], dtype=np.bool_),
        labels=tuple(record.label or "" for _, record, _ in rows),
        fields=_fields([{**record.meta, LANGUAGES: sorted(record.captions)} for _, record, _ in rows]),
        rejections=rejections,
    )


def _fields(metas: list[Mapping[str, object]]) -> dict[str, tuple[tuple[str, ...], NDArray[np.int32]]]:
    """Dictionary-encodes every metadata field that has few enough distinct values to be filtered by."""
    encoded: dict[str, tuple[tuple[str, ...], NDArray[np.int32]]] = {}
    for name in sorted({name for meta in metas for name in meta}):
        codes: dict[str, int] = {}
        column = np.full(len(metas), -1, dtype=np.int32)
        for row, meta in enumerate(metas):
            if name in meta:
                value = json.dumps(meta[name], ensure_ascii=False, sort_keys=True)
                column[row] = codes.setdefault(value, len(codes))
                if len(codes) > MAX_VALUES:
                    break
        else:
            encoded[name] = (tuple(codes), column)
    return encoded


def load_index(path: Path, name: str, cache: Path | None) -> ShardIndex:
    """The index of a shard, from ``cache`` if it fits the shard, else built and kept there.

    Args:
        path: The tar file.
        name: How messages call it.
        cache: The index file; None keeps none. A folder that cannot be written to is no error: the index is then built
            at every start.
    """
    try:
        status = path.stat()
    except OSError as error:
        return _columns([], (Rejection("unreadable_path", name, error.strerror or str(error)),))
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
            rejections=tuple(Rejection(*entry) for entry in text["rejections"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None  # absent, torn or foreign: it is built anew


def _write_cache(cache: Path, stamp: NDArray[np.int64], index: ShardIndex) -> None:
    text = {
        "keys": index.keys,
        "extension": index.extension,
        "labels": index.labels,
        "fields": {name: values for name, (values, _) in index.fields.items()},
        "rejections": [(entry.cause, entry.where, entry.detail) for entry in index.rejections],
    }
    columns: dict[str, Any] = {f"field{number}": codes for number, (_, codes) in enumerate(index.fields.values())}
    arrays: dict[str, Any] = {"media": index.media, "text": index.text, "is_clip": index.is_clip}
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
