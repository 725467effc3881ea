"""The index of a tar shard: offset and metadata of each sample.

With the offsets of all samples, a shard can be read in any order, so that the order of training is a pure function
without a shuffle buffer. The index is built by reading tar headers and the small text members (JSON, txt, cls);
pictures and clips are not decoded, and nothing is ever unpickled.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omnivl.data.formats import CLIP_EXTENSIONS, MEDIA_EXTENSIONS, TEXT_EXTENSIONS, file_named, is_animated
from omnivl.data.record import Record, parse_record
from omnivl.data.sources.base import BadSampleError, Rejection

MAX_VALUES = 4096  # a metadata field with more distinct values in a shard cannot be filtered by
LANGUAGES = "@languages"
_HEADER_BYTES = 64

Span = tuple[int, int]


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples as columns of equal length N.

    Attributes:
        keys: Names of the samples.
        media: int64 ``[N, 2]``: offset and size of the picture or clip, size -1 where a sample has none by the sample's
            own name.
        text: int64 ``[N, 3, 2]``: offset and size of the JSON, txt and cls members; size -1 where there is none.
        extension: Extension of each sample's media; for a sample without media its first unsupported extension, if any.
        is_clip: bool ``[N]``.
        labels: Class name of each sample, "" for none.
        fields: Metadata fields that can be filtered by: for each the distinct values (as JSON) and int32 ``[N]`` codes
            into them, -1 for none. ``@languages`` lists the languages of a sample's captions.
        member_names: Different names of further pictures and clips: ``left.png`` for ``KEY.left.png``.
        members: int64 ``[M, 4]``: row, index in ``member_names``, offset and size of each of these; sorted by row.
        rejections: The bad samples.
    """

    keys: tuple[str, ...]
    media: NDArray[np.int64]
    text: NDArray[np.int64]
    extension: tuple[str, ...]
    is_clip: NDArray[np.bool_]
    labels: tuple[str, ...]
    fields: Mapping[str, tuple[tuple[str, ...], NDArray[np.int32]]]
    member_names: tuple[str, ...]
    members: NDArray[np.int64]
    rejections: tuple[Rejection, ...]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def has_member(self, name: str) -> NDArray[np.bool_]:
        """Which samples have a further file of a name, with or without its extension, bool ``[N]``."""
        numbers = [number for number, member in enumerate(self.member_names) if file_named(name, [member])]
        found = np.zeros(len(self), dtype=np.bool_)
        found[self.members[np.isin(self.members[:, 1], numbers), 0]] = True
        return found

    def members_of(self, row: int) -> dict[str, Span]:
        """Offset and size of a sample's further files."""
        first, last = np.searchsorted(self.members[:, 0], [row, row + 1])
        return {
            self.member_names[number]: (offset, size) for _, number, offset, size in self.members[first:last].tolist()
        }

    def without_media(self, row: int, name: str) -> Rejection:
        """Why a sample cannot be used for its picture or clip; ``name`` is the shard's."""
        where = f"{name}:{self.keys[row]}"
        if self.extension[row]:
            known = ", ".join(sorted(MEDIA_EXTENSIONS))
            return Rejection("unknown_extension", where, f".{self.extension[row]} is not read; known: {known}")
        texts = [kind for kind, (_, size) in zip(TEXT_EXTENSIONS, self.text[row], strict=True) if size >= 0]
        return Rejection("missing_media", where, f"the sample has only {', '.join(sorted(texts))}")


@dataclass
class _Group:
    """The members of one sample, collected while headers are read."""

    key: str
    media: tuple[Span, str] | None = None
    text: dict[str, Span] = field(default_factory=dict)
    members: dict[str, Span] = field(default_factory=dict)
    unknown: str = ""
    repeated: str | None = None

    def add(self, extension: str, span: Span) -> None:
        if extension in TEXT_EXTENSIONS:
            self.repeated = extension if extension in self.text else self.repeated
            self.text.setdefault(extension, span)
        elif extension in MEDIA_EXTENSIONS:
            self.repeated = extension if self.media is not None else self.repeated
            self.media = self.media or (span, extension)
        else:
            self.unknown = self.unknown or extension
            if extension.rpartition(".")[2] in MEDIA_EXTENSIONS:
                self.repeated = extension if extension in self.members else self.repeated
                self.members.setdefault(extension, span)


def split_name(name: str) -> tuple[str, str]:
    """Cuts a member's name into key and extension, as WebDataset does: at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def build_index(path: Path, name: str) -> ShardIndex:
    """Reads a shard's headers and text members. Never raises for a bad shard: mistakes are in ``rejections``.

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
            return  # its other members are in the missing part
    if group is not None:
        yield group


def _check_end(path: Path, offset: int) -> None:
    """Checks the end mark of the archive, since ``tarfile`` takes a damaged or foreign header for the end.

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
        BadSampleError: The group is no usable sample of any kind.
    """
    if group.key in seen:
        raise BadSampleError("duplicate_key", where, "an earlier sample of the shard has this key")
    seen.add(group.key)
    if group.repeated is not None:
        raise BadSampleError("duplicate_key", where, f"the sample has two members for .{group.repeated}")
    texts = {kind: os.pread(descriptor, span[1], span[0]) for kind, span in group.text.items()}
    record = parse_record(texts, where)
    if group.media is None:
        return group, record, False
    (offset, size), extension = group.media
    header = os.pread(descriptor, min(size, _HEADER_BYTES), offset)
    return group, record, extension in CLIP_EXTENSIONS or is_animated(header)


def _columns(rows: list[tuple[_Group, Record, bool]], rejections: tuple[Rejection, ...]) -> ShardIndex:
    absent = (0, -1)
    media = [group.media or (absent, group.unknown) for group, _, _ in rows]
    names = list(dict.fromkeys(name for group, _, _ in rows for name in group.members))
    numbers = {name: number for number, name in enumerate(names)}
    members = [
        (row, numbers[name], *span) for row, (group, _, _) in enumerate(rows) for name, span in group.members.items()
    ]
    text = [[group.text.get(kind, absent) for kind in TEXT_EXTENSIONS] for group, _, _ in rows]
    return ShardIndex(
        keys=tuple(group.key for group, _, _ in rows),
        media=np.array([span for span, _ in media], dtype=np.int64).reshape(-1, 2),
        text=np.array(text, dtype=np.int64).reshape(-1, len(TEXT_EXTENSIONS), 2),
        extension=tuple(extension for _, extension in media),
        is_clip=np.array([clip for _, _, clip in rows], dtype=np.bool_),
        labels=tuple(record.label or "" for _, record, _ in rows),
        fields=_fields([{**record.meta, LANGUAGES: sorted(record.captions)} for _, record, _ in rows]),
        member_names=tuple(names),
        members=np.array(members, dtype=np.int64).reshape(-1, 4),
        rejections=rejections,
    )


def absent_index(name: str, reason: str) -> ShardIndex:
    """The index of a shard that cannot be read."""
    return _columns([], (Rejection("unreadable_path", name, reason),))


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
