"""A Slurm of two nodes on this machine: a controller, and two slurmd in network namespaces with names of their own.

Each node has its own hostname, network, ``/dev/shm`` and two pretended GPUs. Outside of its folder it creates only a
bridge and two namespaces, named after the process that runs the tests.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import patience

NODES = ("n1", "n2")

_CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}({gateway})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=8
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=n1 NodeAddr={network}.1 CPUs=4 RealMemory=8000 Gres=gpu:2 Weight=10
NodeName=n2 NodeAddr={network}.2 CPUs=4 RealMemory=8000 Gres=gpu:2 Weight=1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
"""


class Lab:
    """A running Slurm. Its commands need ``environment``."""

    def __init__(self, folder: Path) -> None:
        """Starts it and waits until both nodes are idle."""
        self.folder = folder
        number = os.getpid()
        self._tag = f"ov{number % 100000}"
        self._network = f"10.{200 + number % 50}.{number // 50 % 250}"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._configure()
            self._start_controller()
            self._sh(f"ip link add {self._tag}b type bridge")
            self._sh(f"ip addr add {self._network}.254/24 dev {self._tag}b")
            self._sh(f"ip link set {self._tag}b up")
            for node in (1, 2):
                self._add_network(node)
                self.start_node(node)
            self.wait_for(lambda: self.state("n1") == self.state("n2") == "idle", 30, "two idle nodes")
        except BaseException:
            self.close()
            raise

    def start_node(self, node: int) -> None:
        """Starts the slurmd of a node, in namespaces of its own."""
        inside = (
            f"hostname n{node} && mount -t tmpfs -o mode=1777 shm /dev/shm && "
            f"mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -N n{node}"
        )
        self._sh(f"nsenter --net=/run/netns/{self._tag}-n{node} unshare -m -u -i sh -c '{inside}'")

    def kill_node(self, node: int) -> None:
        """Kills everything on a node, as a power cut does."""
        for process in self._processes(node):
            os.kill(process, signal.SIGKILL)

    def on_node(self, node: int, command: str) -> None:
        """Runs a command among the mounts of a node's slurmd."""
        slurmd = (self.folder / f"slurmd-n{node}.pid").read_text().strip()
        self._sh(f"nsenter --mount=/proc/{slurmd}/ns/mnt sh -c '{command}'")

    def state(self, node: str) -> str:
        """A node's state, such as ``idle`` or ``down``."""
        return self.run("sinfo", "-h", "-p", "main", "-n", node, "-o", "%t").strip()

    def run(self, *command: str) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        done = patience.run(command, env=self.environment, capture_output=True, text=True, limit=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Fields of a job."""
        fields = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for(self, condition: Callable[[], bool], limit: float, what: str) -> None:
        """Waits, and fails with the daemons' logs."""
        running = patience.Limit(limit)
        while not condition():
            if running.passed():
                logs = "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("slurm*.log")))
                raise AssertionError(f"{what}: not within {limit} s\n{logs}")
            time.sleep(0.1)

    def close(self) -> None:
        """Ends all daemons and jobs, and takes the networks away."""
        for node in (1, 2):
            self.kill_node(node)
        for file in ("slurmctld.pid", "munged.pid"):
            if (self.folder / file).is_file():
                _kill(int((self.folder / file).read_text()))
        for node in (1, 2):
            self._sh(f"ip netns del {self._tag}-n{node}", check=False)
            self._sh(f"ip link del {self._tag}v{node}", check=False)
        self._sh(f"ip link del {self._tag}b", check=False)

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        host = socket.gethostname().split(".")[0]
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        text = _CONFIGURATION.format(
            host=host, gateway=f"{self._network}.254", folder=self.folder, port=port, network=self._network
        )
        (self.folder / "slurm.conf").write_text(text.lstrip())
        for index in (0, 1):
            os.mknod(self.folder / f"gpu{index}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        hosts = [f"{self._network}.{index + 1} {name}" for index, name in enumerate(NODES)]
        (self.folder / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", f"{self._network}.254 {host}", *hosts]) + "\n"
        )

    def _start_controller(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        self._sh(
            f"munged --force --key-file={key} --socket={self.folder}/munge.sock --pid-file={self.folder}/munged.pid "
            f"--log-file={self.folder}/munged.log --seed-file={self.folder}/munge.seed"
        )
        self._sh("slurmctld")

    def _add_network(self, node: int) -> None:
        name = f"{self._tag}-n{node}"
        self._sh(f"ip netns add {name}")
        self._sh(f"ip link add {self._tag}v{node} type veth peer name eth0 netns {name}")
        self._sh(f"ip link set {self._tag}v{node} master {self._tag}b up")
        self._sh(f"ip -n {name} addr add {self._network}.{node}/24 dev eth0")
        self._sh(f"ip -n {name} link set eth0 up")
        self._sh(f"ip -n {name} link set lo up")

    def _processes(self, node: int) -> Sequence[int]:
        command = ["ip", "netns", "pids", f"{self._tag}-n{node}"]
        done = patience.run(command, capture_output=True, text=True, limit=30)
        return [int(process) for process in done.stdout.split()]

    def _sh(self, command: str, check: bool = True) -> None:
        # Not through pipes: a daemon would keep them open.
        with (self.folder / "commands.log").open("ab") as log:
            done = patience.run(
                command, shell=True, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, limit=60
            )
        assert done.returncode == 0 or not check, f"{command}: {(self.folder / 'commands.log').read_text()[-2000:]}"


def _kill(process: int) -> None:
    """Ends a process and waits for its end."""
    try:
        os.kill(process, signal.SIGTERM)
        for _ in range(50):
            os.kill(process, 0)
            time.sleep(0.1)
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
