"""Evaluation within a run: during a stage and at its end."""

from collections.abc import Mapping, Sequence

from engine.hosts.base import Host
from engine.plan.plan import StagePlan
from engine.processes.collectives import make_gather
from omnivl.data.tokenizer import Tokenizer, load_readers
from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.tasks.results import TaskResult
from omnivl.tasks.run import run_tasks


def assess(host: Host, stage: StagePlan, tokenizer: Tokenizer) -> list[TaskResult]:
    """Runs the stage's evaluation tasks on the present chain, each process its share.

    Called by every process; equal on all of them.
    """
    readers = load_readers(stage.model.text_inputs, tokenizer)
    with host.whole_chain() as chain:
        encoder = Encoder(chain, stage.model, tokenizer, make_gather(), host.device, readers=readers)
        return run_tasks(stage.evaluate.tasks, encoder)


def figures_of(results: Sequence[TaskResult]) -> dict[str, float]:
    """All scores by ``task/metric``."""
    return {f"{score.task}/{score.metric}": score.value for result in results for score in result.scores}


def best_figure(figures: Mapping[str, float], name: str) -> float:
    """The figure that decides which checkpoint is the best.

    Raises:
        UserError: There is no such figure.
    """
    if name not in figures:
        raise UserError(
            f"checkpoint.keep_best: got {name!r}, which is no figure of this evaluation; allowed are "
            f"{', '.join(map(repr, figures))}; name one of them, or null to keep no best checkpoint"
        )
    return figures[name]
