"""Runs a plan on this machine: what ``omnivl pretrain`` does without another launcher, and ``omnivl.train``."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.plan.parse import load_plan
from engine.plan.plan import Plan
from launcher.start.local import local_processes, run_local


def run_here(read: Plan, plan: Path, overrides: Sequence[str], arguments: Sequence[str]) -> int:
    """Starts the processes of a run on this machine, and waits for their end.

    Args:
        read: The plan.
        plan: Its file, or the folder of its run.
        overrides: ``path=value`` each.
        arguments: From ``worker_arguments``.

    Returns:
        See ``run_local``.

    Raises:
        PlanError: The plan cannot be run by so many processes.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    processes = local_processes(read.launch.processes, gpus)
    load_plan(plan, overrides, processes)  # reports all mistakes at once, before processes are started
    return run_local("launcher.start.worker", arguments, processes)
