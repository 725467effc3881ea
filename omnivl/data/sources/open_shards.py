"""The shards that a process has open, a bounded number of them."""

import errno
import os
import threading
from collections import OrderedDict

from omnivl.errors import DataError

MOST_OPEN = 64
"""Of one source: those of ten stay below 1024, the usual limit of a process, which has other files open too."""


class OpenShard:
    """A file descriptor, closed when no reference to this object is left.

    A thread that still reads a shard thus keeps it open when others have replaced it. Threads share the descriptor:
    ``os.pread`` needs no file position.
    """

    def __init__(self, descriptor: int) -> None:
        """Takes over an open descriptor."""
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenShards:
    """The shards that were read last, ``MOST_OPEN`` of them. A copy in another process opens its own."""

    def __init__(self) -> None:
        """Opens nothing."""
        self.close()

    def __reduce__(self) -> tuple[type["OpenShards"], tuple[()]]:
        return OpenShards, ()

    def get(self, path: str) -> OpenShard:
        """A shard, opened if it is not.

        Raises:
            OSError: It cannot be opened.
            DataError: No further file can be opened, whichever it is.
        """
        if self._owner != os.getpid():  # forked, maybe while another thread held the lock
            self.close()
        with self._lock:
            shard = self._open.get(path)
            if shard is None:
                shard = OpenShard(_opened(path))
                self._open[path] = shard
                if len(self._open) > MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return shard

    def close(self) -> None:
        """Closes all; those that other threads are reading are closed when that has ended."""
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._owner = os.getpid()


def _opened(path: str) -> int:
    """A file descriptor; raises as ``OpenShards.get`` does."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise DataError(
            f"{path}: got {error.strerror!r}; each source keeps up to {MOST_OPEN} shards open in each process that "
            "reads it; raise the limit (`ulimit -n`), or use fewer sources"
        ) from error
