"""Which tasks a stage can be evaluated by. Tasks say what they need; this module names no task."""

from collections.abc import Iterable

from engine.plan.plan import Plan, StagePlan
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


def possible_kinds(provided: Provided) -> list[str]:
    """Kinds of tasks that can run with their defaults."""
    return [kind for kind, cls in kinds(TaskConfig).items() if not cls().lacks(provided)]
