"""What processes learn of each other without collectives."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist

from engine.processes import ranks


def _hold_store(to_test: Connection, seconds: float) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    to_test.send(store.port)
    time.sleep(seconds)
    os._exit(1)


@pytest.fixture
def store_for(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """This process is rank 1 of 2; rank 0 holds the store, and ends after as many seconds as the test says."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_hold_store, args=(there, request.param))
    process.start()
    store = dist.TCPStore("127.0.0.1", here.recv(), 2, is_master=False)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    yield
    process.kill()
    process.join()


@pytest.mark.parametrize("store_for", [60.0], indirect=True)
@pytest.mark.usefixtures("store_for")
def test_a_process_that_does_not_come_is_told_from_one_that_has_ended() -> None:
    with pytest.raises(TimeoutError, match="late: not every process has come through"):
        ranks.first_problem("late", "no picture", 0.1)


@pytest.mark.parametrize("store_for", [0.5], indirect=True)
@pytest.mark.usefixtures("store_for")
def test_a_process_that_has_ended_is_no_timeout() -> None:
    with pytest.raises(ConnectionError, match="gone: the process that holds the rendezvous store has ended"):
        ranks.first_problem("gone", "Connection reset by peer", 60.0)
