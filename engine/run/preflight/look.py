"""The look at a plan: tokenizer, then of each stage its weights, its lists, its data and its evaluation's data."""

from collections.abc import Collection
from pathlib import Path

from engine.plan.plan import Plan
from engine.run.preflight.data import DataLook, Glances
from engine.run.preflight.findings import Look
from engine.run.preflight.weights import WeightsLook
from engine.run.teachers import check_teacher, find_teacher
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.objectives.text_lists import read_list


def look_at(
    plan: Plan,
    *,
    stages: Collection[int] | None = None,
    world_size: int = 1,
    open_streams: bool = False,
    folder: Path | None = None,
    glances: Glances | None = None,
) -> Look:
    """Looks at everything that a plan names and that can be seen from here. Reads, and writes nothing.

    Its time is bounded however large the data is: see ``omnivl.data.sources.glance``.

    Args:
        plan: Without mistakes.
        stages: Which stages; None for all.
        world_size: Number of processes.
        open_streams: Whether commands are run and addresses fetched.
        folder: Where the plan's file is, for advice; None if it is unknown.
        glances: What opens the sources, if several plans are looked at together.
    """
    look = Look()
    tokenizer = None
    with look.at(("tokenizer",)):
        tokenizer = load_tokenizer(plan.tokenizer)
    weights = WeightsLook(plan, look, tokenizer)
    data = DataLook(plan, look, glances or Glances(), world_size=world_size, open_streams=open_streams, folder=folder)
    for index in range(len(plan.stages)):
        if stages is None or index in stages:
            weights.start(index)
            _lists(plan, index, look)
            if tokenizer is not None:
                _teachers(plan, index, tokenizer, look)
            data.train(index)
            data.evaluate(index)
    return look


def _lists(plan: Plan, index: int, look: Look) -> None:
    """Reads the lists of answers and classes of a stage that were not there when the plan was read."""
    for place, objective in enumerate(plan.stages[index].objectives):
        for option, path in objective.absent_lists.items():
            with look.at(("stages", index, "objectives", place, option)):
                read_list(path, f"objective {objective.key}", option)


def _teachers(plan: Plan, index: int, tokenizer: Tokenizer, look: Look) -> None:
    """Compares the teachers of a stage's objectives with the student; weights are not read."""
    stage = plan.stages[index]
    for place, objective in enumerate(stage.objectives):
        for pupil in objective.pupils:
            part = () if pupil is objective else ("codebook",)
            with look.at(("stages", index, "objectives", place, *part, "teacher")):
                found = find_teacher(objective.key, pupil, plan, index)
                check_teacher(found, objective, pupil, stage, tokenizer)
