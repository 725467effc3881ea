"""The processes of a run find each other, and nobody else, within the time that the plan gives."""

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import patience
import pytest
import torch.distributed as dist

from engine.processes.belonging import LOOPBACK, SECRET, new_secret
from engine.processes.rendezvous import Meeting, RendezvousError, meet, read_meeting
from engine.processes.variables import LaunchError

LAUNCHED = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "23456"},
    SECRET: "ab" * 32,
}


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """Of rank 0 of two, on this machine."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    return Meeting(0, 2, LOOPBACK, port, True, False, bytes.fromhex(new_secret()), "0")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """A thread of torch's that still waits at the end of the interpreter would abort it."""
    yield
    for thread in threading.enumerate():
        if thread.name == "omnivl-rendezvous":
            thread.join(30)


def come(meetings: list[Meeting], seconds: float = 15) -> list[dist.Store | RendezvousError]:
    """Each in a thread; what became of each."""

    def one(meeting: Meeting) -> dist.Store | RendezvousError:
        try:
            return meet(meeting, seconds)
        except RendezvousError as error:
            return error

    with ThreadPoolExecutor(len(meetings)) as pool:
        return list(pool.map(one, meetings))


def test_those_of_a_run_meet(meeting: Meeting) -> None:
    first, second = come([meeting, replace(meeting, rank=1)])
    assert not isinstance(first, RendezvousError)
    assert not isinstance(second, RendezvousError)
    first.set("word", "said")
    assert second.get("word") == b"said"


def listening(port: int) -> set[str]:
    """Addresses on which something of this machine listens at a port."""
    found = set()
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/net", file).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, there = local.partition(":")
            if state == "0A" and int(there, 16) == port:
                found.add(address)
    return found


def test_on_one_machine_only_the_loopback_is_listened_on(meeting: Meeting) -> None:
    stores = come([meeting, replace(meeting, rank=1)])
    assert listening(meeting.port) == {"0100007F"}
    del stores


@pytest.mark.parametrize("other", [b"", b"\1" * 32])
def test_a_rank_without_the_secret_is_refused_by_name(meeting: Meeting, other: bytes) -> None:
    first, second = come([meeting, replace(meeting, rank=1, secret=other)])
    assert "rank 1 does not belong to this run: it came to 127.0.0.1" in str(first)
    assert isinstance(second, RendezvousError)


def test_a_server_without_the_secret_is_refused(meeting: Meeting) -> None:
    """It copies what a rank says, and answers with it."""
    server = dist.TCPStore(LOOPBACK, meeting.port, 2, is_master=True, wait_for_workers=False)
    theirs = dist.PrefixStore("omnivl/0", server)
    theirs.set("asked", b"\2" * 32)
    theirs.set("first/1", b"\3" * 32)
    (refused,) = come([replace(meeting, rank=1)])
    assert f"who answers at 127.0.0.1, port {meeting.port} does not know the secret of this run" in str(refused)


def test_answers_are_those_of_this_side_and_rank(meeting: Meeting) -> None:
    """Sent back, a rank's own proof proves nothing."""
    server = dist.TCPStore(LOOPBACK, meeting.port, 2, is_master=True, wait_for_workers=False)
    theirs = dist.PrefixStore("omnivl/0", server)
    theirs.set("asked", b"\2" * 32)

    def echo() -> None:
        theirs.set("first/1", theirs.get("rank/1")[64:])

    threading.Thread(target=echo, daemon=True).start()
    (refused,) = come([replace(meeting, rank=1)])
    assert "does not know the secret" in str(refused)


def test_a_missing_rank_is_named_in_time(meeting: Meeting) -> None:
    began = time.monotonic()
    first, second = come([replace(meeting, processes=4), replace(meeting, processes=4, rank=2)], 3)
    assert time.monotonic() - began < patience.seconds(4)
    assert "1 of 3 other ranks came to 127.0.0.1" in str(first)
    assert "missing: 1, 3; within launch.timeout_seconds" in str(first)
    assert "rank 0 has refused" in str(second) or "missing" in str(second)


def test_a_rank_that_stands_twice_is_named(meeting: Meeting) -> None:
    others = come([replace(meeting, processes=3), *[replace(meeting, processes=3, rank=1)] * 2], 3)
    assert any("got two processes of rank 1" in str(one) for one in others)


@pytest.fixture(params=["silent", "banner", "closing"])
def stranger(request: pytest.FixtureRequest, _no_thread_is_left: None) -> Iterator[tuple[str, int]]:
    """A server of another kind: what it does, and its port."""
    server, kept = socket.socket(), []

    def serve() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            if request.param == "banner":
                one.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            if request.param == "closing":
                one.close()
            kept.append(one)

    server.bind((LOOPBACK, 0))
    server.listen()
    threading.Thread(target=serve, daemon=True).start()
    yield request.param, server.getsockname()[1]
    for one in (server, *kept):
        one.close()


def test_a_stranger_at_the_port_is_named_in_time(meeting: Meeting, stranger: tuple[str, int]) -> None:
    kind, port = stranger
    began = time.monotonic()
    (refused,) = come([replace(meeting, rank=1, port=port)], 3)
    assert time.monotonic() - began < patience.seconds(5)
    said = {
        "silent": "something takes connections there and says nothing",
        "banner": "another program answers there (b'SSH-2.0-OpenSSH_9.2",
        "closing": "something there closes every connection",
    }
    assert f"no rendezvous at 127.0.0.1, port {port} within 3 s: {said[kind]}" in str(refused)
    assert "set MASTER_PORT to a port that is free" in str(refused)
    (held,) = come([replace(meeting, port=port)], 3)
    assert f"the rendezvous port {port} of this machine cannot be opened (Address already in use)" in str(held)
    assert f"process {os.getpid()} (" in str(held)


@pytest.mark.parametrize("here", [True, False])
def test_a_port_is_free_again_when_its_connections_are_over(meeting: Meeting, here: bool) -> None:
    """The system keeps a connection for a minute after the side that listened has closed it first."""
    with (
        socket.create_server(("", meeting.port)) as server,
        socket.create_connection((LOOPBACK, meeting.port)) as joined,
    ):
        server.accept()[0].close()
        assert joined.recv(1) == b""
    first, second = come([replace(meeting, here=here), replace(meeting, rank=1, here=here)])
    assert not isinstance(first, RendezvousError), first
    assert not isinstance(second, RendezvousError), second


def test_nobody_at_the_port_is_said_in_time(meeting: Meeting) -> None:
    began = time.monotonic()
    (refused,) = come([replace(meeting, rank=1)], 3)
    assert time.monotonic() - began < patience.seconds(5)
    assert "nothing answers there (Connection refused)" in str(refused)


def test_variables_of_the_launcher() -> None:
    here = read_meeting(LAUNCHED)
    assert here == Meeting(1, 2, LOOPBACK, 23456, True, False, b"\xab" * 32, "0")
    assert read_meeting({**LAUNCHED, "LOCAL_WORLD_SIZE": "1"}).address == "node-a"
    served = read_meeting({**LAUNCHED, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (served.address, served.served, served.start) == ("node-a", True, "2")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"RANK": "2"}, "RANK: got 2; allowed are numbers from 0 to 1"),
        ({"RANK": "-1"}, "RANK: got -1; allowed are numbers from 0 to 1"),
        ({"RANK": "²"}, "RANK: got ²"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got two"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000; allowed are numbers from 1 to 65535"),
        ({"MASTER_PORT": "9" * 5000}, "MASTER_PORT: got 9"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: got nothing"),
        ({SECRET: "xy"}, f"{SECRET}: got no hexadecimal number"),
    ],
)
def test_wrong_variables_are_named(wrong: Mapping[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said.replace("²", ".")):
        read_meeting({**LAUNCHED, **wrong})


def test_a_variable_that_is_missing_is_named() -> None:
    with pytest.raises(LaunchError, match="MASTER_PORT: got nothing"):
        read_meeting({name: value for name, value in LAUNCHED.items() if name != "MASTER_PORT"})
