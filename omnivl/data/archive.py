"""Reads the headers of tar archives, from a file or a stream, front to back.

One reader for indexes and streams, so that both see the same samples. It is stricter than ``tarfile``, which takes a
damaged header for the end of the archive, believes any size, and gives the bytes of links and sparse files as if they
stood there. It goes on behind an end mark, as archives that were joined by ``cat`` need. What it holds in memory is
bounded, whatever a header says.

Source: POSIX.1-2017, pax, "pax Interchange Format" and "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from omnivl.data.formats import MEDIA_EXTENSIONS, TEXT_EXTENSIONS
from omnivl.data.templates import filled

ArchiveCause = Literal["truncated_tar", "wrong_archive", "unreadable_path"]

BLOCK = 512
MAX_TEXT_BYTES = 16 << 20  # of a JSON, txt or cls member
MAX_MEMBER_BYTES = 1 << 30  # of any other member that is read
_MAX_HEADER_BYTES = 1 << 20  # of a long name or a pax header
_MAX_ZERO_BYTES = 64 << 20  # behind an end mark; tar fills up to at most some MiB
_STEP = 1 << 20

_ZEROS = bytes(BLOCK)
_PAX_LENGTH = re.compile(rb"([0-9]{1,7}) ")
_REGULAR = b"\0" + b"07"
_WITHOUT_DATA = b"123456"
_PASSED_OVER = b"5VDAN"  # folders and labels
_KINDS = {
    b"1": "a hard link to {link}, whose bytes stand elsewhere; write the archive with tar --hard-dereference",
    b"2": "a symbolic link to {link}, which has no bytes; write the archive with tar --dereference",
    b"3": "a device, which has no bytes; leave it out",
    b"4": "a device, which has no bytes; leave it out",
    b"6": "a FIFO, which has no bytes; leave it out",
    b"S": "stored as a sparse file, whose holes are left out; write the archive without --sparse",
    b"M": "the rest of a file that begins in another archive; join the volumes",
}
_SIGNATURES = {
    b"\x1f\x8b": ("gzip", "unpack it with gunzip"),
    b"BZh": ("bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it with zstd -d"),
    b"PK\x03\x04": ("zip", "unpack it and pack its files with tar --sort=name"),
    b"PK\x05\x06": ("zip", "unpack it and pack its files with tar --sort=name"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "unpack it and pack its files with tar --sort=name"),
    b"Rar!": ("rar", "unpack it and pack its files with tar --sort=name"),
    b"PAR1": ("parquet", "convert it with omnivl data convert table"),
}
_NO_TAR = (
    "this is no tar archive: it does not begin with a header; fetch it again if it was one, or make shards of "
    "pictures and lists with omnivl data convert"
)


class ArchiveError(Exception):
    """An archive cannot be read from some place on.

    Attributes:
        behind_end: Whether that is behind an end mark, so that the last sample before it is whole.
        key: The sample whose member is cut; None where that is not known.
    """

    behind_end = False
    key: str | None = None

    def __init__(self, detail: str, cause: ArchiveCause = "truncated_tar") -> None:
        super().__init__(detail)
        self.detail = detail
        self.cause: ArchiveCause = cause


@dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
        key: Name of its sample: the member's name up to the first dot of its last part, as WebDataset cuts it. Bytes of
            a name that are no UTF-8 are escaped.
        extension: What follows that dot, lower-case.
        offset: Where its bytes begin.
        size: Number of its bytes.
        archive: Number of the archive among those that were joined.
        refused: Why its bytes cannot be used; None if they can.
    """

    key: str
    extension: str
    offset: int
    size: int
    archive: int
    refused: str | None = None


class Readable(Protocol):
    """Bytes from front to back."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, none at the end."""


class FileBytes:
    """A file that is read from front to back, with jumps."""

    def __init__(self, descriptor: int) -> None:
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._place = 0

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, none at the end."""
        data = os.pread(self._descriptor, size, self._place)
        self._place += len(data)
        return data

    def skip(self, size: int) -> int:
        """Passes over at most ``size`` bytes, and says how many there were."""
        passed = max(0, min(size, self.size - self._place))
        self._place += passed
        return passed


def split_name(name: str) -> tuple[str, str]:
    """Cuts a member's name into key and extension, as WebDataset does: at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def foreign_archive(first: bytes) -> str | None:
    """What a file is that is no tar, by its first bytes, and how to make one of it; None if they are unknown."""
    for signature, (name, change) in _SIGNATURES.items():
        if first.startswith(signature):
            return f"this is a {name} file, not a plain tar; {change}"
    return None


class TarReader:
    """Iterates over an archive's members. Between two of them, ``read`` gives the bytes of the last one."""

    def __init__(self, source: Readable) -> None:
        """Reads nothing yet.

        Args:
            source: The archive; a ``FileBytes`` skips what is not read.
        """
        self._source = source
        self._offset = 0
        self._next = 0  # where the next header is
        self._archive = 0
        self._ended = False  # whether the last block was an end mark
        self._shared: dict[str, bytes] = {}  # of global pax headers
        self._own: dict[str, bytes] = {}  # of the next member

    def __iter__(self) -> Iterator[Member]:
        """Regular files, and whatever else is named like one but has to be refused.

        Raises:
            ArchiveError: The archive ends early, or something in it is no tar header.
        """
        try:
            yield from self._members()
        except ArchiveError as error:
            error.behind_end = self._ended
            raise

    def _members(self) -> Iterator[Member]:
        zeros = 0
        while True:
            self._skip_to(self._next)
            block = self._read(BLOCK)
            if not block:
                if self._ended:
                    return
                raise ArchiveError(f"no end mark at offset {self._offset}, but nothing")
            if block == _ZEROS[: len(block)]:
                if self._own:
                    raise ArchiveError(
                        f"an end mark at offset {self._offset - len(block)}, but a header without a file"
                    )
                zeros += len(block)
                if zeros > _MAX_ZERO_BYTES:
                    raise ArchiveError(f"more than {_MAX_ZERO_BYTES} bytes of zeros before offset {self._offset}")
                self._archive += not self._ended
                self._ended = True
                self._shared = {}
                self._next = self._offset
                continue
            member = self._member(block, first=self._next == 0)
            self._ended, zeros = False, 0
            if member is not None:
                yield member

    def read(self, member: Member) -> bytes:
        """The bytes of the member that iteration gave last; at most once.

        Raises:
            ArchiveError: The archive ends within them.
        """
        assert self._offset == member.offset, "only the last member's bytes can be read"
        try:
            return self._exactly(member.size, f"{member.key}.{member.extension}")
        except ArchiveError as error:
            error.key = member.key
            raise

    def skip(self, member: Member) -> None:
        """Passes over the bytes of the member that iteration gave last.

        Raises:
            ArchiveError: The archive ends within them.
        """
        try:
            self._skip_to(member.offset + member.size)
        except ArchiveError as error:
            error.key = member.key
            raise

    def _member(self, block: bytes, *, first: bool) -> Member | None:
        """The member that a header begins; None where it is about another one, or no file."""
        start = self._offset - len(block)
        if len(block) < BLOCK or not _has_checksum(block):
            if first:
                foreign = foreign_archive(block)
                whole = foreign is not None or len(block) == BLOCK
                raise ArchiveError(foreign or _NO_TAR, "wrong_archive" if whole else "truncated_tar")
            raise ArchiveError(f"no end mark at offset {start}, but {len(block)} bytes that are no header")
        kind = block[156:157]
        size = _number(block[124:136], start)
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            self._take_header(kind, size, start)
            return None
        shared, own, self._own = self._shared, self._own, {}
        fields = {**shared, **own}
        if "size" in fields:
            size = _decimal(fields["size"], start)
        name = _text(fields.get("GNU.sparse.name") or fields.get("path") or _plain_name(block))
        link = _text(fields.get("linkpath") or block[157:257].split(b"\0", 1)[0])
        if kind == b"S":
            self._skip_sparse_map(block)
        elif any(key.startswith("GNU.sparse.") for key in fields):
            kind = b"S"
        stored = 0 if kind in _WITHOUT_DATA else size
        offset = self._offset
        self._next = offset + -(-stored // BLOCK) * BLOCK
        self._check_room(name, offset, stored)
        if kind in _PASSED_OVER or (kind == b"\0" and name.endswith("/")) or _is_hidden(name):
            return None
        key, extension = split_name(name)
        return Member(key, extension, offset, stored, self._archive, _refusal(kind, link, extension, stored))

    def _check_room(self, name: str, offset: int, size: int) -> None:
        if isinstance(self._source, FileBytes) and offset + size > self._source.size:
            error = ArchiveError(f"{name} ends behind the end of the file")
            error.key = split_name(name)[0]
            raise error

    def _take_header(self, kind: bytes, size: int, start: int) -> None:
        """Keeps a long name or pax records for the members that follow."""
        if size > _MAX_HEADER_BYTES:
            raise ArchiveError(f"the header at offset {start} has {size} bytes; allowed: {_MAX_HEADER_BYTES}")
        data = self._exactly(size, f"the header at offset {start}")
        self._next = self._offset + -size % BLOCK
        if kind in (b"L", b"K"):
            self._own["path" if kind == b"L" else "linkpath"] = data.split(b"\0", 1)[0]
        elif kind == b"g":
            self._shared = {**self._shared, **_pax_records(data, start)}
        else:
            self._own.update(_pax_records(data, start))

    def _skip_sparse_map(self, block: bytes) -> None:
        """Passes over the further blocks of an old GNU sparse header."""
        more = block[482:483] not in (b"", b"\0")
        while more:
            more = self._exactly(BLOCK, "the map of a sparse file")[504:505] != b"\0"

    def _skip_to(self, offset: int) -> None:
        missing = offset - self._offset
        if missing > 0 and isinstance(self._source, FileBytes):
            self._offset += self._source.skip(missing)
        while self._offset < offset and (data := self._source.read(min(_STEP, offset - self._offset))):
            self._offset += len(data)
        if self._offset < offset:
            raise ArchiveError(f"the archive ends at offset {self._offset}, within a file that goes to {offset}")

    def _read(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end; memory grows with what is there, not with what is asked for."""
        parts: list[bytes] = []
        while size and (data := self._source.read(min(_STEP, size))):
            parts.append(data)
            size -= len(data)
            self._offset += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _exactly(self, size: int, what: str) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise ArchiveError(f"{what} ends behind the end of the archive, at offset {self._offset}")
        return data


def _refusal(kind: bytes, link: str, extension: str, size: int) -> str | None:
    """Why a member's bytes cannot be used."""
    if kind not in _REGULAR:
        described = _KINDS.get(kind, "of the unknown type {kind}; write the archive anew")
        return f".{extension} is {filled(described, {'link': repr(link), 'kind': repr(kind)})}"
    most = MAX_TEXT_BYTES if extension in TEXT_EXTENSIONS else MAX_MEMBER_BYTES
    return f".{extension} has {size} bytes; allowed: {most}" if size > most else None


def matters(extension: str) -> bool:
    """Whether a member of this extension is a part of a sample that can be read."""
    return extension in TEXT_EXTENSIONS or extension.rpartition(".")[2] in MEDIA_EXTENSIONS


def _is_hidden(name: str) -> bool:
    """Hidden files, and notes about the archive such as ``__info__.json``."""
    *folders, base = name.split("/")
    notes = (re.fullmatch(r"__.+__", part) for part in (*folders, base.partition(".")[0]))
    return base.startswith(".") or any(notes)


def _has_checksum(block: bytes) -> bool:
    """Whether a header's checksum is right, of unsigned bytes or, as old programs had it, of signed ones."""
    written = block[148:156].strip(b" \0")
    if re.fullmatch(rb"[0-7]{1,8}", written) is None:
        return False
    rest = block[:148] + block[156:]
    unsigned = sum(rest) + 8 * ord(" ")
    return int(written, 8) in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def _number(digits: bytes, start: int) -> int:
    """A size: octal digits, or where that is too short a binary number."""
    if digits[0] & 0x80:
        value = int.from_bytes(digits, "big") - (digits[0] << 8 * (len(digits) - 1))
        if digits[0] == 0x80 and value >= 0:
            return value
        raise ArchiveError(f"the header at offset {start} says a negative size")
    stripped = digits.split(b"\0", 1)[0].strip()
    if stripped and re.fullmatch(rb"[0-7]+", stripped) is None:
        raise ArchiveError(f"the header at offset {start} says the size {stripped!r}")
    return int(stripped or b"0", 8)


def _decimal(digits: bytes, start: int) -> int:
    if re.fullmatch(rb"[0-9]{1,20}", digits) is None:
        raise ArchiveError(f"the pax header of the file at offset {start} says the size {digits[:30]!r}")
    return int(digits)


def _plain_name(block: bytes) -> bytes:
    """The name that a header itself has. Where POSIX puts a prefix, GNU tar puts times."""
    name, prefix = block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _pax_records(data: bytes, start: int) -> dict[str, bytes]:
    """Values by keyword: each record is ``LENGTH KEYWORD=VALUE`` and a line end, with the length of all of it."""
    records: dict[str, bytes] = {}
    place = 0
    while place < len(data) and data[place]:  # some programs fill up with zeros
        length = _PAX_LENGTH.match(data, place)
        end = place + (0 if length is None else int(length.group(1)))
        keyword, sign, value = data[0 if length is None else length.end() : end].partition(b"=")
        if length is None or end > len(data) or not sign or not value.endswith(b"\n"):
            raise ArchiveError(f"the pax header at offset {start} is damaged at its byte {place}")
        records[keyword.decode("utf-8", "backslashreplace")] = value[:-1]
        place = end
    return records
