"""Streams: how their addresses reach the programs that fetch them, and what they unpack to."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import socket
import sys
import time
import tracemalloc
from pathlib import Path

import patience
import pytest

from omnivl.data.sources.opening import (
    SilentStreamError,
    StreamError,
    check_address,
    command_of,
    is_stream,
    opened_stream,
)
from omnivl.errors import DataError

CURL = ("curl", "--globoff", "--url")


def content(address: str, step: int = 10_000, silent: float = 60) -> bytes:
    with opened_stream(address, silent) as stream:
        return b"".join(iter(lambda: stream.read(step), b""))


@pytest.mark.parametrize(
    "address",
    [
        "s3://b/x;touch FILE;#",
        "s3://b/$(touch FILE).tar",
        "s3://b/`touch FILE`.tar",
        "gs://b/x'; touch FILE; '",
        "https://host/x.tar' -o FILE '",
        "http://host/$(touch FILE)",
    ],
)
def test_an_address_is_one_argument(address, tmp_path, monkeypatch):
    """Programs of these names write their arguments down."""
    for name in ("aws", "gsutil", "curl"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!{sys.executable}\nimport sys\nprint("\\0".join(sys.argv[1:]), end="")\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    arguments = content(address).decode().split("\0")
    assert arguments.count(address) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    command = command_of(address)
    assert isinstance(command, list)
    assert command[1:] == arguments


def test_the_programs():
    assert command_of("S3://b/x.tar") == ["aws", "s3", "cp", "s3://b/x.tar", "-"]
    assert command_of("gs://b/x.tar") == ["gsutil", "cat", "gs://b/x.tar"]
    assert set(CURL) <= set(command_of("https://host/[1-9].tar"))
    assert command_of("pipe:cat a | b") == "cat a | b"


def test_what_is_a_stream():
    assert all(map(is_stream, ("pipe:x", "HTTP://h/x", "https://h/x", "s3://b/x", "gs://b/x")))
    assert not any(map(is_stream, ("/data/x.tar", "data/{0..9}.tar", "emoji", "ftp://h/x", "C:/x", "pipes/x")))


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (
            "ftp://host/x.tar",
            r"addresses of ftp:// are not read; allowed: http://, https://, s3://, gs://, pipe:COMMAND",
        ),
        ("file:///etc/passwd", r"addresses of file:// are not read"),
        ("s3:///x.tar", r"no host or bucket; write s3://HOST/PATH.tar"),
        ("https://host/x\n-o FILE", r"a control character; write https://HOST/PATH.tar"),
        ("http://[::1/x.tar", r"no address: Invalid IPv6 URL"),
        ("pipe:  ", r"no command; write pipe:COMMAND"),
    ],
)
def test_addresses_that_are_none(address, found):
    with pytest.raises(DataError, match=found):
        check_address(address)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_streams_are_unpacked(pack, tmp_path):
    plain = os.urandom(300_000) + bytes(1000)
    file = tmp_path / "x"
    file.write_bytes(pack(plain) + pack(b"second part"))
    assert content(f"pipe:cat {file}") == plain + b"second part"
    file.write_bytes(pack(plain) + bytes(512))
    assert content(f"pipe:cat {file}", step=100_000) == plain, "zeros that fill the last block"
    file.write_bytes(pack(plain)[:-20])
    with pytest.raises(StreamError, match=r"ends within its compressed data|cannot be unpacked"):
        content(f"pipe:cat {file}")


def test_a_stream_that_grows_out_of_proportion_ends(tmp_path):
    """A 1 MB file that would take 1 GB."""
    with gzip.open(tmp_path / "x.gz", "wb") as file:
        for _ in range(1 << 10):
            file.write(bytes(1 << 20))
    packed = (tmp_path / "x.gz").stat().st_size
    given: list[int] = []
    tracemalloc.start()
    with opened_stream(f"pipe:cat {tmp_path}/x.gz", 60) as stream:
        parts = (given.append(len(data)) for data in iter(lambda: stream.read(1 << 20), b""))
        with pytest.raises(StreamError, match="more than 64 times"):
            list(parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(given) <= (32 << 20) + 64 * packed
    assert peak < 4 << 20


def test_a_program_that_fails_says_so():
    with pytest.raises(StreamError, match=r"status 3: no such bucket"):
        content("pipe:printf abc; echo first >&2; echo no such bucket >&2; exit 3")
    with pytest.raises(StreamError, match=r"^the program ended with status 7$"):
        content("pipe:exit 7")


def test_a_program_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StreamError, match=r"aws cannot be started: No such file or directory; install it"):
        content("s3://b/x.tar")


def test_zip_and_zstd_streams_are_called_by_their_name(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(StreamError, match="this is a zip file"):
        content(f"pipe:cat {tmp_path}/x")


def test_leaving_early_ends_the_program_and_its_children(tmp_path):
    with opened_stream(f"pipe:yes & echo $! > {tmp_path}/child; wait", 60) as stream:
        assert stream.read(4) == b"y\ny\n"
    child = Path("/proc") / (tmp_path / "child").read_text().strip()

    def is_gone() -> bool:
        return not child.exists() or (child / "stat").read_text().split()[2] == "Z"

    patience.wait_for(is_gone, 5, "the end of the shell's child")


def test_a_shell_reads_nothing_of_the_terminal():
    assert content("pipe:cat") == b""


def test_read_gives_at_most_what_is_asked_for(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(range(256)) * 10))
    with opened_stream(f"pipe:cat {tmp_path}/x.gz", 60) as stream:
        parts = list(iter(lambda: stream.read(7), b""))
    assert max(map(len, parts)) <= 7
    assert io.BytesIO(b"".join(parts)).read() == bytes(range(256)) * 10


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("sleep 60", "^nothing came for 0.3 s$"),
        ("printf abc; sleep 60", "^nothing came for 0.3 s$"),
        ("head -c 100000 /dev/zero; sleep 60", "^nothing came for 0.3 s$"),
        ("printf '\\037\\213\\010'; sleep 60", "^nothing came for 0.3 s$"),
        ("echo 503, will try again >&2; sleep 60", "^nothing came for 0.3 s: 503, will try again$"),
        ("mkfifo FIFO; cat FIFO", "^nothing came for 0.3 s$"),
        ("(sleep 60 &) ; exit 0", "^nothing came for 0.3 s$"),
    ],
)
def test_a_program_that_sends_nothing_is_ended(command, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(SilentStreamError, match=told):
        content(f"pipe:{command}", silent=0.3)
    assert time.monotonic() - began < 20


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_a_server_that_accepts_and_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SilentStreamError, match=r"^nothing came for 0\.5 s"):
            content(f"http://127.0.0.1:{port}/x.tar", silent=0.5)


def test_time_between_reads_is_not_silence():
    with opened_stream("pipe:printf abc; sleep 0.2; printf def", 5) as stream:
        first = stream.read(3)
        time.sleep(0.5)
        assert first + b"".join(iter(lambda: stream.read(100), b"")) == b"abcdef"
