"""Runs evaluation tasks."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

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
            return [_run(task, encoder) for task in tasks]
    finally:
        encoder.chain.train(was_training)


def _run(task: Task, encoder: Encoder) -> TaskResult:
    result = task.run(encoder)
    others = [one.metric for one in result.scores if not any(fnmatchcase(one.metric, name) for name in task.figures)]
    assert not others, f"task {task.kind}: {others} are not among its figures, by which plans name them"
    return replace(
        result, scores=tuple(replace(one, lower_is_better=task.prefers_lower(one.metric)) for one in result.scores)
    )
