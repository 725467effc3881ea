"""Where the processes of a run meet: a store on rank 0's machine, in which each shows that it belongs to this run.

torch's ``TCPStore`` asks nobody who they are. So, before anything else is exchanged, every rank shows rank 0 and rank 0
shows every rank that it knows the run's secret, by an answer to a number that the other has drawn (HMAC-SHA256); the
secret itself is never sent. A launcher of ours hands a new secret to each start through ``SECRET``. Where there is
none, as under torchrun, the same exchange only finds processes that came by mistake.

What this keeps out: another run, or another program, at the same port; ranks that stand twice or are missing. It does
not encrypt what follows: whoever can change packets between the machines of a run can change its numbers.

On one machine the store listens on the loopback interface alone, and so does gloo.
"""

import contextlib
import datetime
import hashlib
import hmac
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import psutil
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # those of torch.distributed, with their types

from engine.processes.belonging import LOOPBACK, SECRET
from engine.processes.variables import LaunchError, number_in

_BACKLOG = 2048
_LOOK_SECONDS = 0.2
_LAST_SECONDS = 4.0
"""Of the time to meet, what is kept for saying what went wrong: to the others, through the store, and to the user."""


class RendezvousError(LaunchError):
    """The processes of a run did not come together."""


@dataclass(frozen=True)
class Meeting:
    """A process' place in a run, and where the others are met.

    Attributes:
        rank: Of this process.
        processes: Of the run.
        address: Of the machine with the store.
        port: Of the store.
        here: Whether all processes are on this machine.
        served: Whether the launcher has opened the store, as torchrun does.
        secret: Of the run; empty where its launcher gave none.
        start: Number of this start, where the launcher starts processes again over the same store.
    """

    rank: int
    processes: int
    address: str
    port: int
    here: bool
    served: bool
    secret: bytes
    start: str

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.address}, port {self.port}"


def read_meeting(environment: Mapping[str, str]) -> Meeting:
    """The meeting that a launcher's variables describe.

    Raises:
        LaunchError: A variable is missing, or is not a number in its range.
    """
    processes = number_in(environment, "WORLD_SIZE", least=1, most=1 << 24)
    rank = number_in(environment, "RANK", most=processes - 1)
    port = number_in(environment, "MASTER_PORT", least=1, most=(1 << 16) - 1)
    if not (address := environment.get("MASTER_ADDR", "")):
        raise RendezvousError("MASTER_ADDR: got nothing; allowed is the name of rank 0's machine; set it")
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    here = processes == 1 or environment.get("LOCAL_WORLD_SIZE") == str(processes)
    try:
        secret = bytes.fromhex(environment.get(SECRET, ""))
    except ValueError as error:
        raise RendezvousError(f"{SECRET}: got no hexadecimal number; leave it out, or set 64 digits") from error
    start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Meeting(rank, processes, LOOPBACK if here and not served else address, port, here, served, secret, start)


def meet(meeting: Meeting, timeout_seconds: float) -> Store:
    """Joins the store and waits until every rank has shown that it belongs to the run.

    Args:
        meeting: This process' place.
        timeout_seconds: For all of it, and afterwards for each of the store's waits.

    Returns:
        The store, for the process group.

    Raises:
        RendezvousError: Within that time somebody did not come, or somebody else was there.
    """
    if meeting.here:
        use_loopback()
    last = min(_LAST_SECONDS, timeout_seconds / 3)
    patience = timeout_seconds - last
    deadline = time.monotonic() + patience
    found: queue.SimpleQueue[Store | RuntimeError | RendezvousError] = queue.SimpleQueue()

    def come_together() -> None:
        try:
            store = _open(meeting, timeout_seconds)
            _Proof(meeting, store, deadline, last / 4).show()
        except (RuntimeError, RendezvousError) as error:  # RuntimeError: all of the store's, also of its connection
            found.put(error)
        else:
            found.put(store)

    # In a thread of its own: torch waits without end for a server that takes the connection and says nothing.
    threading.Thread(target=come_together, name="omnivl-rendezvous", daemon=True).start()
    try:
        outcome = found.get(timeout=patience + last / 2)
    except queue.Empty:
        outcome = RuntimeError(f"no answer within {timeout_seconds:g} s")
    if isinstance(outcome, RendezvousError):
        raise outcome
    if isinstance(outcome, RuntimeError):
        raise RendezvousError(
            f"rank {meeting.rank}: no rendezvous at {meeting.place} within {timeout_seconds:g} s: "
            f"{_answer(meeting.address, meeting.port)}; rank 0 should listen there. See what rank 0 says, set "
            "MASTER_PORT to a port that is free on its machine, and look whether a firewall is between the two"
        ) from outcome
    return outcome


def use_loopback() -> None:
    """Has gloo and NCCL use the loopback interface, unless a variable says otherwise."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == LOOPBACK for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return


def _open(meeting: Meeting, timeout_seconds: float) -> Store:
    """The store: opened by rank 0, unless the launcher has; joined by the others.

    Raises:
        RuntimeError: It cannot be joined.
        RendezvousError: It cannot be opened.
    """
    opens = meeting.rank == 0 and not meeting.served
    listener = _listener(meeting) if opens else None
    store = TCPStore(
        meeting.address,
        meeting.port,
        meeting.processes,
        is_master=opens,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    return PrefixStore(f"omnivl/{meeting.start}", store)


def _listener(meeting: Meeting) -> int | None:
    """A listening socket of the loopback interface, as a descriptor; None where other machines have to reach it.

    Raises:
        RendezvousError: The port is in use.
    """
    listener = socket.socket()
    try:
        # As torch's own does: without it a port is in use for a minute after its last connection, such as those of the
        # check of nodes that came before.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK if meeting.here else "", meeting.port))
        if meeting.here:
            listener.listen(_BACKLOG)
            return listener.detach()
    except OSError as error:
        raise RendezvousError(
            f"rank 0: the rendezvous port {meeting.port} of this machine cannot be opened ({error.strerror})"
            f"{_holder(meeting.port)}; end what uses it, or set MASTER_PORT to a free port"
        ) from error
    finally:
        listener.close()
    return None


def _holder(port: int) -> str:
    """Who listens at a port of this machine, where the system tells."""
    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid is not None:
                return f": process {one.pid} ({psutil.Process(one.pid).name()}) listens there"
    return ""


def _answer(address: str, port: int) -> str:
    """What is at a port, for messages."""
    try:
        with socket.create_connection((address, port), timeout=2) as probe:
            probe.settimeout(1)
            said = probe.recv(60)
    except TimeoutError:
        return "something takes connections there and says nothing, so that it may be another program or another run"
    except OSError as error:
        return f"nothing answers there ({error.strerror or error})"
    return f"another program answers there ({said!r})" if said else "something there closes every connection"


class _Proof:
    """Each side draws a number and wants an answer that only the secret gives."""

    def __init__(self, meeting: Meeting, store: Store, deadline: float, notice: float) -> None:
        """``notice``: seconds that a refusal stands in the store before rank 0 ends, and the store with it."""
        self._meeting, self._store, self._deadline, self._notice = meeting, store, deadline, notice

    def show(self) -> None:
        """Called by every rank.

        Raises:
            RendezvousError: Somebody does not belong here, or is missing.
        """
        if self._meeting.rank == 0:
            self._as_first()
        else:
            self._as_other()

    def _as_first(self) -> None:
        """Rank 0: asks every rank, then answers all of them."""
        meeting = self._meeting
        asked = secrets.token_hex(32)
        if self._store.add("first", 1) > 1:
            raise RendezvousError(f"{meeting.place}: got two processes of rank 0; give each its own RANK")
        self._store.set("asked", asked)
        drawn = {}
        for rank in range(1, meeting.processes):
            came = self._await(f"rank/{rank}", partial(self._missing, rank))
            drawn[rank], said = came[:64], came[64:]
            if not hmac.compare_digest(said, self._sign("rank", rank, asked.encode() + drawn[rank]).encode()):
                self._refuse(f"rank {rank} does not belong to this run: it came to {meeting.place} without the secret")
        for rank, number in drawn.items():
            self._store.set(f"first/{rank}", self._sign("first", rank, asked.encode() + number))

    def _as_other(self) -> None:
        """Any other rank: answers rank 0 and wants an answer."""
        meeting, rank = self._meeting, self._meeting.rank
        asked = self._await("asked", lambda: f"rank 0 did not come to {meeting.place}")
        if self._store.add(f"came/{rank}", 1) > 1:
            raise RendezvousError(
                f"{meeting.place}: got two processes of rank {rank}, or two runs; give each process its own RANK and "
                "each run its own MASTER_PORT"
            )
        drawn = secrets.token_hex(32)
        numbers = asked + drawn.encode()
        self._store.set(f"rank/{rank}", drawn + self._sign("rank", rank, numbers))
        answer = self._await(f"first/{rank}", lambda: "rank 0 waits for another rank, or has ended")
        if not hmac.compare_digest(answer, self._sign("first", rank, numbers).encode()):
            raise RendezvousError(
                f"rank {rank}: who answers at {meeting.place} does not know the secret of this run: it is another run "
                "or a stranger; set MASTER_PORT to another port, and see docs/slurm.md on what has to be closed"
            )

    def _sign(self, side: str, rank: int, numbers: bytes) -> str:
        said = f"omnivl {side} {rank} of {self._meeting.processes} start {self._meeting.start} ".encode()
        return hmac.new(self._meeting.secret, said + numbers, hashlib.sha256).hexdigest()

    def _await(self, key: str, problem: Callable[[], str]) -> bytes:
        """The value of a key; rank 0's refusal of the whole run is looked for as well."""
        while not self._store.check([key]):
            if self._meeting.rank and self._store.check(["refused"]):
                raise RendezvousError(
                    f"rank 0 has refused: {self._store.get('refused')[:500].decode(errors='replace')}"
                )
            if time.monotonic() > self._deadline:
                self._refuse(f"rank {self._meeting.rank}: {problem()} within launch.timeout_seconds")
            time.sleep(_LOOK_SECONDS if self._meeting.processes > 64 else _LOOK_SECONDS / 10)
        found: bytes = self._store.get(key)
        return found

    def _missing(self, first: int) -> str:
        names = [str(rank) for rank in range(first, self._meeting.processes) if not self._store.check([f"rank/{rank}"])]
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        came = self._meeting.processes - 1 - len(names)
        return f"{came} of {self._meeting.processes - 1} other ranks came to {self._meeting.place}; missing: {shown};"

    def _refuse(self, problem: str) -> None:
        advice = "look at the logs of the ranks that are missing, and whether they can reach that port"
        if self._meeting.rank == 0:
            self._store.set("refused", problem)
            time.sleep(self._notice)
        raise RendezvousError(f"{problem}; {advice}")
