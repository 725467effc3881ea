"""The index of a tar shard: offset, size and metadata of each sample.

With the offsets of all samples, a shard can be read in any order, so that the order of training is a pure function
without a shuffle buffer. The index is built by reading tar headers and the small text members (JSON, txt, cls);
pictures and clips are not decoded, and nothing is ever unpickled.
"""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omnivl.data.archive import ArchiveError, FileBytes, TarReader
from omnivl.data.formats import TEXT_EXTENSIONS, file_named, is_clip, may_move, picture_format, picture_size
from omnivl.data.groups import Group, group_members, lacking_media
from omnivl.data.metadata import FieldColumns, FieldEncoder
from omnivl.data.orientation import upright_size
from omnivl.data.record import Record, parse_record
from omnivl.data.sources.base import BadSampleError, Rejection

LANGUAGES = "@languages"
_HEADER_BYTES = 64

Span = tuple[int, int]

_ABSENT: Span = (0, -1)
_UNKNOWN = (0, 0)
_SIZE_BYTES = (1024, 65_536, 1_048_576)
"""Of a picture that are read to find its size: in most files the first are enough."""
_SCAN_BYTES = 16
"""The longest header of a JPEG's scan, its marker included."""
_FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


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
        sizes: int32 ``[N, 2]``: width and height in pixels, upright; 0 where they are not known. A picture's are those
            of its header, a clip's what the sample's JSON says under ``width`` and ``height``. A WebP or PNG may say
            that it is turned behind its first 1,024 bytes, which are not read: its width and height are then exchanged.
        labels: Class name of each sample, "" for none.
        fields: Metadata fields that can be filtered by. ``@languages`` lists the languages of a sample's captions.
        member_names: Different names of further pictures and clips: ``left.png`` for ``KEY.left.png``.
        members: int64 ``[M, 4]``: row, index in ``member_names``, offset and size of each of these; sorted by row.
        rejections: The bad samples.
    """

    keys: tuple[str, ...]
    media: NDArray[np.int64]
    text: NDArray[np.int64]
    extension: tuple[str, ...]
    is_clip: NDArray[np.bool_]
    sizes: NDArray[np.int32]
    labels: tuple[str, ...]
    fields: FieldColumns
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

    def only(self, keep: NDArray[np.bool_]) -> "ShardIndex":
        """The samples where ``keep``, bool ``[N]``, is true."""
        rows = np.flatnonzero(keep).tolist()
        members = self.members[keep[self.members[:, 0]]]
        members[:, 0] = (np.cumsum(keep) - 1)[members[:, 0]]
        return replace(
            self,
            keys=tuple(self.keys[row] for row in rows),
            media=self.media[keep],
            text=self.text[keep],
            extension=tuple(self.extension[row] for row in rows),
            is_clip=self.is_clip[keep],
            sizes=self.sizes[keep],
            labels=tuple(self.labels[row] for row in rows),
            fields=self.fields.only(keep),
            members=members,
        )

    def without_media(self, row: int, name: str) -> Rejection:
        """Why a sample cannot be used for its picture or clip; ``name`` is the shard's."""
        where = f"{name}:{self.keys[row]}"
        texts = [kind for kind, (_, size) in zip(TEXT_EXTENSIONS, self.text[row], strict=True) if size >= 0]
        return lacking_media(self.extension[row], texts, where).rejection


def build_index(path: Path, name: str, enough: Callable[[int], bool] | None = None) -> ShardIndex:
    """Reads a shard's headers and text members. Never raises for a bad shard: mistakes are in ``rejections``.

    Time and memory are bounded by the size of the file.

    Args:
        path: The tar file, not compressed.
        name: How messages call it.
        enough: Ends the reading after a number of samples for which it is true; None reads the whole shard.
    """
    columns = _Columns()
    rejections: list[Rejection] = []
    whole = True
    try:
        with opened_shard(path) as descriptor:
            whole = _fill(columns, descriptor, name, rejections, enough)
    except OSError as error:
        rejections.append(Rejection("unreadable_path", name, error.strerror or str(error)))
    if whole and not columns.keys and not rejections:
        rejections.append(
            Rejection("empty_shard", name, "the archive has no samples; leave it out of the source, or write it again")
        )
    return columns.to_index(tuple(rejections))


@contextmanager
def opened_shard(path: Path) -> Iterator[int]:
    """A file descriptor of a shard.

    Raises:
        OSError: It cannot be opened, or is no regular file: opening a FIFO would wait for somebody who writes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"{_FILE_KINDS.get(kind, 'a special file')}, not a file")
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(
    columns: "_Columns",
    descriptor: int,
    name: str,
    rejections: list[Rejection],
    enough: Callable[[int], bool] | None,
) -> bool:
    """Fills columns from a shard; returns whether it came to the end."""
    source = FileBytes(descriptor)
    if source.size == 0:
        rejections.append(Rejection("empty_shard", name, "the file has no bytes"))
        return True
    members = ((member, (member.offset, member.size)) for member in TarReader(source))
    try:
        for group in group_members(members):
            if enough is not None and enough(len(columns.keys) + len(rejections)):
                return False
            where = f"{name}:{group.key}"
            try:
                columns.add(group, *_examine(descriptor, group, where))
            except BadSampleError as error:
                rejections.append(error.rejection)
                if error.rejection.cause == "scattered_members":
                    columns.drop(group.key)
    except ArchiveError as error:
        rejections.append(Rejection(error.cause, name, f"{error.detail}; the file has {source.size} bytes"))
    return True


def _examine(descriptor: int, group: Group[Span], where: str) -> tuple[Record, bool, tuple[int, int]]:
    """Reads a group's text members and the first bytes of its media.

    Returns:
        The texts, whether the media is a clip, and its width and height, 0 where they are not known.

    Raises:
        BadSampleError: The group is no usable sample of any kind.
    """
    if group.problem is not None:
        raise BadSampleError(group.problem[0], where, group.problem[1])
    texts = {kind: os.pread(descriptor, span[1], span[0]) for kind, span in group.text.items()}
    record = parse_record(texts, where)
    if group.media is None:
        return record, False, _UNKNOWN
    span, extension = group.media
    moves = _moves(descriptor, span, extension)
    return record, moves, _size_in_header(descriptor, span) or _size_in_text(record)


def _size_in_header(descriptor: int, span: Span) -> tuple[int, int] | None:
    """Width and height of a picture as it is shown, of which no more is read than its header; None for a video."""
    offset, size = span
    for length in _SIZE_BYTES:
        head = os.pread(descriptor, min(size, length), offset)
        if picture_format(head) is None:
            return None
        found = picture_size(head)
        if found is not None and (length >= min(size, _SIZE_BYTES[-1]) or not _turn_is_cut(head)):
            return _in_range(upright_size(found, head))
    return None


def _turn_is_cut(head: bytes) -> bool:
    """Whether a JPEG may say that it is turned in a header of which too little was read.

    It says so before its size, but Pillow opens no JPEG whose header ends before the first scan. A preview inside the
    header has a scan, too: the size of the picture itself stands behind it.
    """
    if picture_format(head) != "jpeg" or not (b"Exif" in head or b"tiff:Orientation" in head):
        return False
    scan = head.rfind(b"\xff\xda", 0, max(0, len(head) - _SCAN_BYTES + 2))
    return scan < 0 or picture_size(head[:scan]) is None


def _size_in_text(record: Record) -> tuple[int, int]:
    match record.meta.get("width"), record.meta.get("height"):
        case int(width), int(height):
            return _in_range((width, height))
    return _UNKNOWN


def _in_range(size: tuple[int, int]) -> tuple[int, int]:
    """A width and height that an index can hold; a picture's header and a sample's JSON may say anything."""
    return size if all(0 < side < 2**31 for side in size) else _UNKNOWN


def _moves(descriptor: int, span: Span, extension: str) -> bool:
    """Whether a picture or clip is a clip; of a GIF or WebP no more is read than up to the second frame, or nearly."""
    offset, size = span
    length = _HEADER_BYTES
    while True:
        head = os.pread(descriptor, min(size, length), offset)
        if is_clip(extension, head):
            return True
        if length >= size or not may_move(head):
            return False
        length *= 16


class _Columns:
    """Columns of an index that grow sample by sample."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._media: list[Span] = []
        self._text: list[list[Span]] = []
        self._extension: list[str] = []
        self._is_clip: list[bool] = []
        self._sizes: list[tuple[int, int]] = []
        self._labels: list[str] = []
        self._fields = FieldEncoder()
        self._numbers: dict[str, int] = {}
        self._members: list[tuple[int, int, int, int]] = []
        self._dropped: set[str] = set()

    def add(self, group: Group[Span], record: Record, is_clip: bool, size: tuple[int, int]) -> None:
        """Appends a sample."""
        row = len(self.keys)
        span, extension = group.media or (_ABSENT, group.unknown)
        self.keys.append(group.key)
        self._media.append(span)
        self._extension.append(sys.intern(extension))
        self._text.append([group.text.get(kind, _ABSENT) for kind in TEXT_EXTENSIONS])
        self._is_clip.append(is_clip)
        self._sizes.append(size)
        self._labels.append(sys.intern(record.label or ""))
        self._fields.add(row, {**record.meta, LANGUAGES: sorted(record.captions)})
        for name, place in group.members.items():
            self._members.append((row, self._numbers.setdefault(name, len(self._numbers)), *place))

    def drop(self, key: str) -> None:
        """Removes the sample of a key, other parts of which come later."""
        self._dropped.add(key)

    def to_index(self, rejections: tuple[Rejection, ...]) -> ShardIndex:
        """The index of the samples so far."""
        whole = ShardIndex(
            keys=tuple(self.keys),
            media=np.array(self._media, dtype=np.int64).reshape(-1, 2),
            text=np.array(self._text, dtype=np.int64).reshape(-1, len(TEXT_EXTENSIONS), 2),
            extension=tuple(self._extension),
            is_clip=np.array(self._is_clip, dtype=np.bool_),
            sizes=np.array(self._sizes, dtype=np.int32).reshape(-1, 2),
            labels=tuple(self._labels),
            fields=self._fields.columns(len(self.keys)),
            member_names=tuple(self._numbers),
            members=np.array(self._members, dtype=np.int64).reshape(-1, 4),
            rejections=rejections,
        )
        if not self._dropped:
            return whole
        return whole.only(np.array([key not in self._dropped for key in self.keys], dtype=np.bool_))


def absent_index(name: str, reason: str) -> ShardIndex:
    """The index of a shard that cannot be read."""
    return _Columns().to_index((Rejection("unreadable_path", name, reason),))
