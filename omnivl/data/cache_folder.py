"""The user's own cache folder, and the secret by which indexes of other makers are told from one's own.

A folder is used only if nobody else can write into it. Where the home folder cannot be written, as on compute nodes,
that is a folder below the temporary ones, which everybody may make first: a foreign one is left alone.
"""

import atexit
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path

_SECRET = "index.key"
_SECRET_BYTES = 32
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """``$OMNIVL_CACHE``, else ``$XDG_CACHE_HOME/omnivl``, else ``~/.cache/omnivl``, else one below the temporary files.

    Each is passed over, with a warning, if it is not the user's or others can write into it. The last one is then a new
    folder of this process, which is removed when it ends.
    """
    named = os.environ.get("OMNIVL_CACHE")
    if named and _is_own(Path(named)):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  # raises nothing
    home, shared = Path(base) / "omnivl", Path(tempfile.gettempdir()) / f"omnivl-{os.getuid()}"
    _close(home)
    if _is_own(home):
        return home
    return shared if not shared.is_symlink() and _is_own(shared) else _folder_of_process()


def _close(folder: Path) -> None:
    """Takes others' right to write from a folder of the user's, which an earlier umask may have given."""
    try:
        status = folder.stat()
        if status.st_uid == os.geteuid() and status.st_mode & _OTHERS_WRITE:
            folder.chmod(status.st_mode & 0o7777 & ~_OTHERS_WRITE)
    except OSError:
        return  # it does not exist yet, or is looked at below


def _is_own(folder: Path) -> bool:
    """Makes the folder if it is missing, and says whether it is the user's and nobody else can write into it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        _warn(folder, status.st_uid)
        return False
    return os.access(folder, os.W_OK)


@cache
def _warn(folder: Path, owner: int) -> None:
    warnings.warn(
        f"the cache folder {folder} is not used: it belongs to user {owner}, or others can write into it (chmod go-w); "
        "name a folder of your own in OMNIVL_CACHE",
        stacklevel=4,
    )


@cache
def _folder_of_process() -> Path:
    folder, maker = Path(tempfile.mkdtemp(prefix=f"omnivl-{os.getuid()}-")), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@cache
def index_secret() -> bytes:
    """The user's secret of 32 bytes, made on first use; of this process alone where it cannot be kept."""
    path = cache_folder() / _SECRET
    fresh = secrets.token_bytes(_SECRET_BYTES)
    try:
        # Linked into place when it is complete, so that processes that start together take the same one.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{_SECRET}.") as file:  # its mode is 0600
            file.write(fresh)
            file.flush()
            try:
                os.link(file.name, path)
            except FileExistsError:
                return _read_secret(path) or fresh
        return fresh
    except OSError:
        return fresh


def _read_secret(path: Path) -> bytes | None:
    """The secret in a file that is the user's alone; None for any other."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
        found = os.read(descriptor, _SECRET_BYTES + 1)
        return found if own and len(found) == _SECRET_BYTES else None
    finally:
        os.close(descriptor)
