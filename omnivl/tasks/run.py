"""Runs evaluation tasks."""

from collections.abc import Sequence

import torch

from omnivl.inference.encoder import Encoder
from omnivl.tasks.results import TaskResult
from omnivl.tasks.task import Task


def run_tasks(tasks: Sequence[Task], encoder: Encoder) -> list[TaskResult]:
    """Runs every task in order, without gradients, and leaves the chain's training mode as it was.

    Called by every replica; results are equal on all of them.
    """
    was_training = encoder.chain.training
    encoder.chain.eval()
    try:
        with torch.no_grad():
            return [task.run(encoder) for task in tasks]
    finally:
        encoder.chain.train(was_training)
