"""One node's part of a launch by deepspeed: ``python -m launcher.slurm.deepspeed_node HOSTFILE LOGS ARGUMENTS ...``.

It replaces itself by ``deepspeed --no_ssh``, which starts the ranks of this node, each under a supervisor, so that the
number of a killed rank is known. Slurm sends USR1 and TERM to every process of a step. deepspeed would end at them
while its ranks save: it is set to ignore both, and the ranks catch them.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence


def command(hostfile: str, logs: str, arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of deepspeed's launcher on this node.

    Args:
        hostfile: The nodes of the job and their ranks.
        logs: Folder for a log of each rank.
        arguments: For ``launcher.start.worker``.
        environment: Slurm's variables of this task, and the rendezvous of the ranks.
    """
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh", "--hostfile", hostfile),
        *("--node_rank", environment["SLURM_NODEID"]),
        *("--master_addr", environment["MASTER_ADDR"], "--master_port", environment["MASTER_PORT"]),
        *("--no_local_rank", "--enable_each_rank_log", logs, "--module", "launcher.start.supervisor"),
        *("launcher.start.worker", *arguments),
    ]


def main() -> None:
    """Replaces this process by deepspeed's launcher."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    hostfile, logs, *arguments = sys.argv[1:]
    line = command(hostfile, logs, arguments, os.environ)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
