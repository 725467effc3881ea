"""Opens what can only be read from front to back, by the scheme of its address.

An address is handed to the program that fetches it as one argument, never through a shell. Only ``pipe:COMMAND`` is a
shell's command, since that is what it says; whether a plan may name one is decided where the plan is read.
"""

import bz2
import lzma
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Protocol
from urllib.parse import urlsplit

from omnivl.data.archive import ArchiveError, Readable, foreign_archive
from omnivl.errors import DataError

PIPE = "pipe:"
STREAM_SCHEMES = ("http", "https", "s3", "gs")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHUNK = 1 << 16
_PEEK = 8
_FREE_BYTES = 32 << 20  # that a compressed stream may give whatever its size
_LARGEST_RATIO = 64  # of what it gives beyond to what it is
_LZMA_MEMORY = 256 << 20
_END_SECONDS = 30
_CURL = (
    *("curl", "--silent", "--show-error", "--fail", "--location", "--globoff", "--connect-timeout", "30"),
    *("--retry", "30", "--retry-delay", "2", "--proto", "=http,https", "--proto-redir", "=http,https", "--url"),
)


class StreamError(ArchiveError):
    """A stream ends early, or what it gives cannot be used."""


class SilentStreamError(StreamError):
    """A stream sends nothing and does not end."""


def scheme_of(source: str) -> str | None:
    """What a source begins with before ``://``, lower-case; ``pipe`` for a command, None for a path."""
    if source.startswith(PIPE):
        return "pipe"
    found = _SCHEME.match(source)
    return None if found is None else found.group(1).lower()


def is_stream(source: str) -> bool:
    """Whether a source can only be read from front to back."""
    return scheme_of(source) in ("pipe", *STREAM_SCHEMES)


def check_address(source: str) -> None:
    """Refuses an address that cannot be one.

    Raises:
        DataError: It names no scheme that is read, no host or bucket, or has a control character.
    """
    scheme = scheme_of(source)
    if scheme is None:
        return
    if scheme == "pipe":
        if not source.removeprefix(PIPE).strip():
            raise DataError(f"data source {source!r}: no command; write pipe:COMMAND")
        return
    if scheme not in STREAM_SCHEMES:
        known = ", ".join(f"{name}://" for name in STREAM_SCHEMES)
        raise DataError(
            f"data source {source!r}: addresses of {scheme}:// are not read; allowed: {known}, pipe:COMMAND, or a path"
        )
    try:
        host = urlsplit(source).netloc
    except ValueError as error:
        raise DataError(f"data source {source!r}: no address: {error}; mend it") from error
    if not host or re.search(r"[\x00-\x1f\x7f]", source):
        missing = "no host or bucket" if not host else "a control character"
        raise DataError(f"data source {source!r}: {missing}; write {scheme}://HOST/PATH.tar")


def command_of(address: str) -> str | list[str]:
    """The program that gives a stream's bytes: a list of arguments, or of ``pipe:`` the shell's command."""
    check_address(address)
    scheme, _, rest = address.partition("://")
    match scheme_of(address):
        case "pipe":
            return address.removeprefix(PIPE)
        case "s3":
            return ["aws", "s3", "cp", f"s3://{rest}", "-"]
        case "gs":
            return ["gsutil", "cat", f"gs://{rest}"]
        case _:
            return [*_CURL, f"{scheme.lower()}://{rest}"]


@contextmanager
def opened_stream(address: str, timeout: float, seconds: float | None = None) -> Iterator[Readable]:
    """The bytes of a stream, unpacked where it is a gzip, bzip2 or xz stream.

    Leaving the block before the end stops the program.

    Args:
        address: See ``command_of``.
        timeout: Seconds that reading waits for the next bytes.
        seconds: After which the program is stopped, and its output with it; None waits as long as it sends something.

    Raises:
        StreamError: The program is missing or fails, or the stream grows out of proportion when it is unpacked. Also
            from reading.
        SilentStreamError: Nothing came for that long. Also from reading.
    """
    command = command_of(address)
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(
                command,
                shell=isinstance(command, str),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=messages,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise StreamError(f"{command[0]} cannot be started: {error.strerror}; install it") from error
        assert process.stdout is not None
        program = _Program(process, process.stdout, messages, timeout)
        timer = None if seconds is None else threading.Timer(seconds, program.kill)
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            yield _unpacked(program)
        finally:
            if timer is not None:
                timer.cancel()
            program.stop()


@dataclass
class _Program:
    """A program's output; at its end its exit status is looked at."""

    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    messages: IO[bytes]
    timeout: float

    def __post_init__(self) -> None:
        self._poll = select.poll()  # select itself knows no descriptors above 1023
        self._poll.register(self.output, select.POLLIN)

    def read(self, size: int, /) -> bytes:
        if not self._poll.poll(1000 * self.timeout):
            raise SilentStreamError(f"nothing came for {self.timeout:g} s{self._said()}", "unreadable_path")
        data = os.read(self.output.fileno(), size)
        if not data and size:
            self._check_end()
        return data

    def _check_end(self) -> None:
        try:
            status = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise StreamError(f"the program does not end within {_END_SECONDS} s of its output") from error
        if status != 0:
            raise StreamError(f"the program ended with status {status}{self._said()}")

    def _said(self) -> str:
        """The last line that the program has said, after a colon; nothing where it said nothing."""
        said = os.pread(self.messages.fileno(), _CHUNK, 0).decode("utf-8", "backslashreplace")
        last = said.strip().rpartition("\n")[2]
        return f": {last}" if last else ""

    def stop(self) -> None:
        """Ends the program; what it writes after this goes nowhere."""
        self.output.close()
        self.kill()
        self.process.wait()

    def kill(self) -> None:
        """Ends the program where it still runs, so that its output ends."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # a shell's children too; it leads a session of its own


class _Decompressor(Protocol):
    """What the decompressors of the standard library have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


class _Unpacked:
    """A compressed stream's content. At no time more than one chunk of it is held."""

    def __init__(self, source: Readable, make: "Callable[[], _Decompressor | _Gzip]", first: bytes) -> None:
        self._source, self._make, self._stream = source, make, make()
        self._input = first
        self._taken, self._given = len(first), 0
        self._ended = False

    def read(self, size: int, /) -> bytes:
        while not self._ended:
            if self._stream.eof and not self._begin_next():
                break
            try:
                data = self._stream.decompress(self._input, min(size, _CHUNK))
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                raise StreamError(f"the stream cannot be unpacked: {error}") from error
            self._input = b""
            if data:
                self._given += len(data)
                if self._given > _FREE_BYTES + _LARGEST_RATIO * self._taken:
                    raise StreamError(
                        f"{self._taken} bytes of the stream unpack to more than {_LARGEST_RATIO} times that"
                    )
                return data
            if not self._stream.eof and not self._refill():
                raise StreamError("the stream ends within its compressed data")
        return b""

    def _begin_next(self) -> bool:
        """Goes on with a stream that was appended; False at the end, also where zeros fill it up."""
        self._input = self._stream.unused_data
        while not self._input.strip(b"\0"):
            self._input = b""
            if not self._refill():
                self._ended = True
                return False
        self._stream = self._make()
        return True

    def _refill(self) -> bool:
        self._input = self._source.read(_CHUNK)
        self._taken += len(self._input)
        return bool(self._input)


class _Gzip:
    """``zlib``'s decompressor in the form of the others, which keep what they have not used yet."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Peeked:
    """A source whose first bytes have been looked at."""

    def __init__(self, source: Readable, first: bytes) -> None:
        self._source, self._first = source, first

    def read(self, size: int, /) -> bytes:
        if not self._first:
            return self._source.read(size)
        data, self._first = self._first[:size], self._first[size:]
        return data


def _unpacked(source: Readable) -> Readable:
    first = b""
    while len(first) < _PEEK and (data := source.read(_PEEK - len(first))):
        first += data
    if first.startswith(b"\x1f\x8b"):
        return _Unpacked(source, _Gzip, first)
    if first.startswith(b"BZh"):
        return _Unpacked(source, bz2.BZ2Decompressor, first)
    if first.startswith(b"\xfd7zXZ"):
        return _Unpacked(source, lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY), first)
    foreign = foreign_archive(first)
    if foreign is not None:
        raise StreamError(foreign, "wrong_archive")
    return _Peeked(source, first)
