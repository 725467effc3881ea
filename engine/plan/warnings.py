"""What a plan may say but rarely means: told by ``omnivl check`` and at the start of a run, which goes on."""

from collections.abc import Iterator

from engine.plan.plan import Plan, StagePlan


def warnings_of(plan: Plan) -> list[str]:
    """One line for each."""
    return [f"stages.{stage.name}.{warning}" for stage in plan.stages for warning in stage_warnings(stage)]


def stage_warnings(stage: StagePlan) -> Iterator[str]:
    """Those about one stage; each begins with the field within the stage."""
    warmup = stage.optimizer.warmup_steps
    if warmup > stage.steps:
        reached = stage.optimizer.learning_rate(stage.steps - 1, stage.steps)
        yield (
            f"optimizer.warmup_steps: {warmup:,} are more than the stage's {stage.steps:,} steps: the learning rate "
            f"ends at {reached:.3g}, before it reaches {stage.optimizer.lr:g}"
        )
