"""Files of arrays that only this user can have made: ``.safetensors`` with a hash keyed by a secret of the user's.

A file that came with a data set could name other bytes than its maker's, or leave samples out. (Not as ``.npz``: NumPy
reads an array's header with ``ast.literal_eval``, and several threads at that at once end in a SystemError on Python
3.11.)
"""

import hmac
import os
import stat
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from omnivl.data.cache_folder import index_secret

Arrays = dict[str, NDArray[Any]]


def read_signed(path: Path, most: int) -> Arrays | None:
    """The arrays of a file; None where it is absent, damaged, larger than ``most`` bytes, or not this user's."""
    try:
        stored = load(_read_bounded(path, most))
        signature = bytes(stored.pop("signature"))
        return stored if hmac.compare_digest(signature, bytes(_signature(stored))) else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def write_signed(path: Path, arrays: Arrays) -> bool:
    """Writes a file that ``read_signed`` takes, whole or not at all, and its folder; says whether that was possible."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(save({**arrays, "signature": _signature(arrays)}))
        os.replace(temporary, path)  # noqa: PTH105  # atomic: another process sees the old or the new one
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


def _signature(arrays: Arrays) -> NDArray[np.uint8]:
    """The keyed hash of all arrays with their names, types and shapes."""
    return np.frombuffer(blake2b(save(arrays), key=index_secret(), digest_size=32).digest(), dtype=np.uint8)


def _read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: It is no regular file, or larger than ``most`` bytes.
        OSError: It cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise ValueError(f"{path} is no file of at most {most} bytes")
        return file.read(most)
