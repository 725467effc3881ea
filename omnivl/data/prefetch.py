"""Batches made ahead of time without worker processes."""

import queue
import threading
from collections.abc import Iterator

from omnivl.data.work import BatchMaker, BatchRequest, Failure, Result

THREAD_NAME = "omnivl-loader"


def in_thread(maker: BatchMaker, requests: Iterator[BatchRequest], ahead: int) -> Iterator[Result | Failure]:
    """Makes batches in a background thread: decoding releases the interpreter lock."""
    ready: queue.Queue[Result | Failure | BaseException] = queue.Queue(maxsize=max(1, ahead))
    stop = threading.Event()

    def put(item: Result | Failure | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for request in requests:
                put(maker[request])
                if stop.is_set():
                    return
        except BaseException as error:  # raised again where the batches are taken
            put(error)

    thread = threading.Thread(target=work, name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=10)
