"""Reading files that a plan names and that are small by nature: plans, vocabularies, lists of answers, settings."""

import errno
import os
import stat
from pathlib import Path

MEBIBYTE = 1 << 20


def read_small(path: Path, mebibytes: int = 1) -> bytes:
    """The content of a file, read in memory that ``mebibytes`` bounds and without waiting for another process.

    Args:
        path: The file.
        mebibytes: Size of the largest file that is read, in MiB.

    Raises:
        OSError: It cannot be read, is not regular or is too large; ``strerror`` says which.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        content = file.read(mebibytes * MEBIBYTE + 1)
    if len(content) > mebibytes * MEBIBYTE:
        raise OSError(errno.EFBIG, f"larger than {mebibytes} MiB", str(path))
    return content


def check_small(folder: Path, mebibytes: int) -> None:
    """Looks at the files of a folder that another library is going to read whole.

    Args:
        folder: Its own files are looked at, not those of folders within.
        mebibytes: Size of the largest file that is allowed, in MiB.

    Raises:
        OSError: A file cannot be looked at, is not regular or is too large; ``strerror`` and ``filename`` say which.
    """
    for file in sorted(folder.iterdir()):
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(file))
        if status.st_size > mebibytes * MEBIBYTE:
            raise OSError(errno.EFBIG, f"larger than {mebibytes} MiB", str(file))
