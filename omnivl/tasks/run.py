"""Runs a plan's evaluation tasks."""

from collections.abc import Sequence

import torch

from omnivl.tasks.captions import evaluate_captions
from omnivl.tasks.config import CaptionTask, RetrievalTask, RoutingTask, TaskConfig, ZeroShotTask
from omnivl.tasks.encoder import Encoder
from omnivl.tasks.results import TaskResult
from omnivl.tasks.retrieval import evaluate_retrieval
from omnivl.tasks.zero_shot import evaluate_zero_shot


def run_tasks(tasks: Sequence[TaskConfig], encoder: Encoder) -> list[TaskResult]:
    """Evaluates every task in order, without gradients, and leaves the chain's training mode as it was.

    Called by every replica; results are equal on all of them.
    """
    was_training = encoder.chain.training
    encoder.chain.eval()
    try:
        with torch.no_grad():
            return [_run(task, encoder) for task in tasks]
    finally:
        encoder.chain.train(was_training)


def _run(task: TaskConfig, encoder: Encoder) -> TaskResult:
    match task:
        case RetrievalTask():
            return evaluate_retrieval(task, encoder)
        case ZeroShotTask():
            return evaluate_zero_shot(task, encoder)
        case CaptionTask():
            return evaluate_captions(task, encoder)
        case RoutingTask():
            from omnivl.tasks.routing_scores import evaluate_routing  # pandas, which the others do without

            return evaluate_routing(task, encoder)
