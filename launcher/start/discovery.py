"""Rank and rendezvous of this process, whichever launcher started it.

torchrun, deepspeed and our own launcher set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
``MASTER_PORT``. ``mpirun`` and ``srun`` have other variables; this module sets the former from them. All other code
reads only those.
"""

import os
import socket
from collections.abc import Mapping

import psutil

from engine.processes.belonging import LOOPBACK, SECRET, new_secret
from engine.processes.variables import number_in
from launcher.start.nodes import expand_nodes, rendezvous_port, tasks_on_node
from launcher.start.supervisor import follow_launcher, supervise
from omnivl.errors import UserError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables of Open MPI, MVAPICH, and MPICH with its derivatives."""

_MEETING_BYTES = 512
"""Of the message that says where the processes of mpirun meet; names of machines have at most 253 characters."""

BY_DEEPSPEED = "CROSS_RANK"
"""Set by deepspeed's launcher alone."""

_FOLLOWED = {"TORCHELASTIC_RUN_ID", BY_DEEPSPEED}
"""Set by torchrun and by deepspeed, which normally run as long as their ranks."""


def join_launch(*, by_hand: bool = True) -> bool:
    """Sets torchrun's variables in the environment where another launcher has started this process.

    Args:
        by_hand: Whether a user may have started this process, in a shell that srun has started as its only task.

    Returns:
        Whether a launcher started this process. False if a user started it, so that it has to start the processes
        itself. Under ``mpirun`` the process goes on as a child of itself, see ``launcher.start.supervisor``.

    Raises:
        UserError: Started by ``mpirun`` in an installation without mpi4py, or by ``srun`` with wrong variables.
    """
    environment = os.environ
    if "RANK" in environment:
        if "LOCAL_SIZE" in environment:  # what deepspeed's launcher calls it
            environment.setdefault("LOCAL_WORLD_SIZE", environment["LOCAL_SIZE"])
        if _FOLLOWED & environment.keys():  # a user who sets the variables may end at once
            follow_launcher()
        return True
    # srun sets PMI_SIZE as well, for MPI's sake; a process of srun's with its own step is Slurm's.
    if environment.get("OMPI_COMM_WORLD_SIZE") or ("SLURM_STEP_NUM_TASKS" not in environment and _mpi_size()):
        environment.update(_from_mpi())
        supervise()
    elif number_in(environment, "SLURM_STEP_NUM_TASKS", absent=0) > int(by_hand):
        found = from_slurm(environment)
        _choose_interface(environment)
        for name, value in found.items():
            environment.setdefault(name, value)
    return "RANK" in environment


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun for a process that ``srun`` has started.

    Processes meet on the step's first node, at a port that follows from the job's number.

    Raises:
        LaunchError: One of Slurm's is no number.
    """
    nodes = expand_nodes(environment["SLURM_STEP_NODELIST"])
    node = number_in(environment, "SLURM_NODEID", absent=0)
    job, step = (number_in(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], node)),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(rendezvous_port(job, step)),
    }


def interface_towards(host: str) -> str | None:
    """The network interface by which ``host`` is reached; None if unknown or if it is the loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, only determines the route
            address = probe.getsockname()[0]
    except OSError:
        return None
    if address.startswith("127."):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None


def _choose_interface(environment: "os._Environ[str]") -> None:
    """Has gloo use the interface that leads to the other nodes.

    By itself it takes whatever the hostname resolves to, which is often the loopback. NCCL chooses well by itself.
    """
    nodes = expand_nodes(environment["SLURM_STEP_NODELIST"])
    if len(nodes) == 1 or "GLOO_SOCKET_IFNAME" in environment:
        return
    interface = interface_towards(nodes[1 if environment.get("SLURM_NODEID", "0") == "0" else 0])
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface


def _mpi_size() -> str | None:
    return next((os.environ[name] for name in _MPI_SIZES if os.environ.get(name)), None)


def _from_mpi() -> dict[str, str]:
    """Asks MPI, of any implementation, and finalises it at once: training does not use it.

    mpirun takes a process that ends by ``os._exit`` without finalising MPI for a failed one.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun: got {_mpi_size()} processes, and no mpi4py that tells them who they are ({error}); allowed are "
            "launches in which mpi4py can be imported; install it (pip install mpi4py, built for the MPI of this "
            "mpirun), or use torchrun"
        ) from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    found = {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(local.Get_rank()),
        "LOCAL_WORLD_SIZE": str(local.Get_size()),
    }
    alone = local.Get_size() == world.Get_size()
    meeting = bytearray(_MEETING_BYTES)  # a buffer of fixed size: MPI's messages of objects are pickled
    if world.Get_rank() == 0:
        host = LOOPBACK if alone else socket.gethostname()
        text = f"{host} {free_port()} {new_secret()}".encode("ascii")
        meeting[: len(text)] = text
    world.Bcast(meeting, root=0)
    MPI.Finalize()
    host, port, secret = meeting.rstrip(b"\0").decode("ascii").split(" ")
    return {**found, "MASTER_ADDR": host, "MASTER_PORT": port, SECRET: secret}


def free_port(first: int = 0, tries: int = 100) -> int:
    """A free port: the first one from ``first`` on, or any if that is 0.

    Raises:
        OSError: None of ``tries`` ports was free.
    """
    for port in range(first, first + tries) if first else (0,):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port from {first} to {first + tries - 1}")
