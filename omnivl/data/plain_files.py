"""Opens plain files alone: to read what is small by nature, as plans and vocabularies are, and to write into a run.

Only what is a plain file is read, and never more than a stated size.

A path in a plan may name a device, a pipe or a link to one; reading these whole ends with the memory, or never.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from omnivl.errors import DataError

MIB = 1 << 20
MAX_TEXT_FILE = 64 * MIB
"""Bytes of a vocabulary, a tokenizer's file, a configuration; the largest in use today have about 35 MiB."""


def read_small(path: Path, most: int = MIB) -> bytes:
    """The content of a file, read in memory that ``most`` bounds and without waiting for another process.

    Args:
        path: The file.
        most: Largest size in bytes.

    Raises:
        OSError: It cannot be read, is not regular or is too large; ``strerror`` says which.
    """
    with open_plain(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most // MIB} MiB", str(path))
    return content


def open_plain(path: Path) -> BufferedReader:
    """Opens a regular file for reading, without waiting for another process as a pipe does.

    Raises:
        OSError: It cannot be opened or is not regular; ``strerror`` says which.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(handle, "rb")


def not_through_links(path: str, flags: int) -> int:
    """The ``opener`` of files that are written into a folder to which others may write too.

    A symbolic link that somebody has put in a file's place is not followed: what is written stays in the folder. Links
    among the folders above are followed; they are how a run lies on another disk.

    Raises:
        OSError: It is a link or no regular file, which ``strerror`` says, or it cannot be opened.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "a symbolic link, through which nothing is written", path) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", path)
    return handle


def check_plain_file(path: Path, most: int = MAX_TEXT_FILE) -> None:
    """Refuses what cannot be read whole.

    Args:
        path: A file, or a link to one.
        most: Largest size in bytes.

    Raises:
        DataError: It is no plain file, or larger.
        OSError: There is none, or it cannot be looked at.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(
            f"{path}: got what is no plain file (a folder, device or pipe); allowed is a plain file; name one"
        )
    if found.st_size > most:
        raise DataError(f"{path}: got {found.st_size:,} bytes; allowed are {most:,}; name another file")


def read_plain_text(path: Path, most: int = MAX_TEXT_FILE, encoding: str = "utf-8") -> str:
    """The content of a text file, line ends as they are.

    Raises:
        DataError: It is no plain file, or larger than ``most`` bytes.
        OSError, UnicodeDecodeError: It cannot be read, or is no text.
    """
    check_plain_file(path, most)
    return read_small(path, most).decode(encoding)


def text_lines(text: str) -> list[str]:
    r"""The lines of a text, without their ends and without empty ones at its end.

    Only ``\n``, ``\r\n`` and ``\r`` end a line: ``str.splitlines`` cuts at eight further marks, which stand within the
    words of vocabularies and the texts of captions.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1]:
        lines.pop()
    return lines
