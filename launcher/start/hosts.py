"""A run over the machines of a hostfile, without Slurm: deepspeed's launcher reaches them by ``pdsh`` over ``ssh``."""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launcher.start.discovery import free_port
from omnivl.data.plain_files import read_small, text_lines
from omnivl.errors import UserError

_SLOTS = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
_SAFE = re.compile(r"[A-Za-z0-9_.,:/@%+=-]+")
"""Characters that a remote shell does not interpret: deepspeed joins its command with blanks, a shell splits it."""


def read_hostfile(file: Path) -> dict[str, int]:
    """The machines of a hostfile, in its order, and the processes on each: lines ``HOST slots=N``.

    Raises:
        UserError: It cannot be read, or a line says something else.
    """
    try:
        lines = text_lines(read_small(file).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8 at byte {error.start}"
        raise UserError(f"--hostfile: got {file}, which cannot be read ({reason}); name a hostfile") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _SLOTS.fullmatch(line.strip())
        if match is None or match[1] in hosts or int(match[2]) == 0:
            raise UserError(
                f"{file}:{number}: got {line.strip()!r}; allowed is each machine once, HOST slots=N with N processes; "
                "write it in this form"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{file}: got no machine; allowed are lines HOST slots=N; add one")
    return hosts


def run_over_hosts(hostfile: Path, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by deepspeed's launcher, which runs ``launcher.start.worker arguments`` on all machines.

    Raises:
        UserError: pdsh is missing, or an argument would reach the other machines changed.
    """
    for argument in (*arguments, str(Path.cwd())):
        if _SAFE.fullmatch(argument) is None:
            raise UserError(
                f"--hostfile: got the argument {argument!r}, which a shell on the other machines would take apart; "
                "allowed are letters, digits and _.,:/@%+=-; put overrides into the plan, rename files"
            )
    if shutil.which("pdsh") is None:
        raise UserError(
            "--hostfile: got a machine without pdsh, by which deepspeed reaches the others; install pdsh, or use "
            "mpirun --hostfile with the command as it stands"
        )
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi"),
        *("--master_port", str(free_port()), "--no_local_rank", "--module", "launcher.start.worker", *arguments),
    ]
    os.execv(command[0], command)
