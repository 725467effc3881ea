"""Runs a plan's evaluation tasks."""

from collections.abc import Sequence

import torch

from omnivl.evaluation.captions import evaluate_captions
from omnivl.evaluation.config import CaptionTask, RetrievalTask, RoutingTask, TaskConfig, ZeroShotTask
from omnivl.evaluation.encoder import Encoder
from omnivl.evaluation.results import TaskResult
from omnivl.evaluation.retrieval import evaluate_retrieval
from omnivl.evaluation.zero_shot import evaluate_zero_shot


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
            from omnivl.evaluation.routing_scores import evaluate_routing  # pandas, which the others do without

            return evaluate_routing(task, encoder)
