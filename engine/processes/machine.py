"""Which machine a process runs on."""

import socket
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """A name that processes have in common only if they run under one kernel.

    The name of the machine alone does not tell: containers on several machines may all have the same one.
    """
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    return f"{socket.gethostname()} {boot}".rstrip()
