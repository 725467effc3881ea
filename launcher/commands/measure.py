"""``omnivl measure``: measures this machine, for ``omnivl estimate --hardware FILE``."""

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.disk.run_folder import write_whole
from engine.estimate.measure import hardware_yaml, measure_hardware
from engine.processes import ranks
from engine.processes.process_group import join_process_group, launched_processes, local_processes
from engine.telemetry.console import say
from launcher.commands.outputs import require_writable
from launcher.start.local import local_processes as default_processes
from launcher.start.local import run_local
from launcher.start.worker import end_process


def measure(
    out: Annotated[Path, typer.Argument(help="YAML file to write, e.g. configs/hardware/mine.yaml.")],
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that measure at once; one per GPU, or two without.")
    ] = None,
) -> None:
    """Measures products, memory and links of this machine and writes its profile.

    Examples:
      omnivl measure mine.yaml
      omnivl measure mine.yaml --processes 1
    """
    require_writable(out, "FILE")
    count = default_processes(processes or "auto", torch.cuda.device_count())
    code = run_local("launcher.commands.measure", [str(out.resolve())], count)
    if code:
        raise typer.Exit(code)
    say(out)


def _measure(out: Path) -> int:
    """One of the processes."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = join_process_group(always=launched_processes() > 1)
    hardware = measure_hardware(device, local_processes=local_processes())
    if ranks.rank() == 0:
        write_whole(out, hardware_yaml(hardware))
    return 0


if __name__ == "__main__":
    end_process(lambda: _measure(Path(sys.argv[1])))
