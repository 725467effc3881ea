"""Divides this machine among several runs at the same time: each has GPUs and cores of its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.telemetry.environment import usable_cores


@dataclass(frozen=True)
class Share:
    """The share of one run.

    Attributes:
        gpus: As ``CUDA_VISIBLE_DEVICES`` names them.
        cores: How many.
    """

    gpus: Sequence[str]
    cores: int

    def environment(self, processes: int) -> dict[str, str]:
        """Variables for a run of this many processes. ``OMP_NUM_THREADS`` stays as it is where it is set."""
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {"OMP_NUM_THREADS": str(max(1, self.cores // processes)), **os.environ, **seen}


def share_machine(runs: int) -> list[Share]:
    """Divides the machine into a number of shares; if there are fewer GPUs than runs, some runs share one."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:count] if named else [str(index) for index in range(count)]
    cores = max(1, usable_cores() // runs)
    return [Share(gpus[run::runs] or gpus[run % max(1, count) :][:1], cores) for run in range(runs)]
