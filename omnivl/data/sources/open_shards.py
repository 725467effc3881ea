"""The shards that a process has open, a bounded number of them."""

import os
import threading
from collections import OrderedDict

MOST_OPEN = 64
"""Of one source: a mixture of ten stays below the usual limit of 1024 open files, with room for those of others."""


class OpenShard:
    """A file descriptor, closed when nobody holds this object any more.

    So a thread can go on reading a shard that another thread has replaced by one that it needs. All share the
    descriptor: ``os.pread`` needs no file position.
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
        """
        if self._owner != os.getpid():  # forked, maybe while another thread held the lock
            self.close()
        with self._lock:
            shard = self._open.get(path)
            if shard is None:
                shard = OpenShard(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                self._open[path] = shard
                if len(self._open) > MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return shard

    def close(self) -> None:
        """Closes all but those that another thread is reading, which it closes after that."""
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._owner = os.getpid()
