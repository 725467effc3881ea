"""Which tasks a stage can be evaluated by. Tasks say what they need; this module names no task."""

from collections.abc import Iterable

from engine.plan.plan import CheckpointConfig, Plan, StagePlan
from engine.plan.schema import kinds
from omnivl.tasks import Provided, TaskConfig

LOWER_IS_BETTER = frozenset({"MAE", "mean rank"})
"""Figures of tasks of which ``best_is: auto`` takes the lowest: errors, and ranks from 1."""


def provided_by(stage: StagePlan, ancestors: Iterable[StagePlan]) -> Provided:
    """What a stage provides to tasks.

    Args:
        stage: The stage.
        ancestors: The stages that it descends from.
    """
    earlier = tuple(objective for one in ancestors for objective in one.objectives)
    return Provided(stage.model, stage.objectives, earlier)


def provided_in(plan: Plan, stage: StagePlan) -> Provided:
    """What a stage of a plan provides to tasks."""
    return provided_by(stage, plan.ancestors(stage))


def lowest_is_best(checkpoint: CheckpointConfig) -> bool:
    """Whether the best checkpoint is that with the lowest value of ``keep_best``."""
    if checkpoint.best_is == "auto":
        return (checkpoint.keep_best or "").partition("/")[2] in LOWER_IS_BETTER
    return checkpoint.best_is == "lowest"


def possible_kinds(provided: Provided) -> list[str]:
    """Kinds of tasks that can run with their defaults."""
    return [kind for kind, cls in kinds(TaskConfig).items() if not cls().lacks(provided)]
