"""Which tasks a stage can be evaluated by. Tasks say what they need; this module names no task."""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.plan.plan import CheckpointConfig, EvaluationPlan, Plan, StagePlan
from engine.plan.schema import kinds
from omnivl.tasks import Provided, TaskConfig


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


@dataclass(frozen=True)
class Best:
    """What decides which checkpoint of a stage is the best.

    Attributes:
        figure: ``TASK/FIGURE``.
        lowest: Whether its lowest value is the best one, not its highest.
    """

    figure: str
    lowest: bool

    def __str__(self) -> str:
        return f"{'lowest' if self.lowest else 'highest'} {self.figure}"


def best_of(evaluate: EvaluationPlan, checkpoint: CheckpointConfig) -> Best | None:
    """What decides which checkpoint of a stage is the best; None if no figure does."""
    figure = checkpoint.keep_best if evaluate.keep_best is None else evaluate.keep_best
    if figure is None:
        return None
    if checkpoint.best_is == "auto":
        name, _, metric = figure.partition("/")
        return Best(figure, any(task.prefers_lower(metric) for task in evaluate.tasks if task.name == name))
    return Best(figure, checkpoint.best_is == "lowest")


def possible_kinds(provided: Provided) -> list[str]:
    """Kinds of tasks that can run with their defaults."""
    return [kind for kind, cls in kinds(TaskConfig).items() if not cls().lacks(provided)]
