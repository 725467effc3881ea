"""The look at a plan's data, weights and tokenizers that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from engine.disk.run_folder import RunFolder
from engine.plan.parse import plan_file
from engine.plan.places import places_of
from engine.plan.plan import Plan
from engine.run.earlier import Start
from engine.run.preflight import Look, look_at
from engine.run.preflight.findings import lines
from engine.run.preflight.folder import look_at_folder

Offline = Annotated[
    bool, typer.Option("--offline", help="Do not look at data, weights and tokenizers: they are not on this machine.")
]


def look_from_here(
    plan: Plan,
    file: Path,
    world_size: int,
    *,
    run_folder: Path | None = None,
    start: Start = Start(),  # noqa: B008 - frozen
) -> Look:
    """Looks at what a plan names outside of itself, from this machine. Streams are not opened.

    Args:
        plan: Without mistakes.
        file: Where it was read from; also the folder of a run.
        world_size: Number of processes.
        run_folder: Where the run will be written; None leaves it out.
        start: How the run will be started there.
    """
    stages = None if start.stage is None else [i for i, one in enumerate(plan.stages) if one.name == start.stage]
    look = look_at(plan, stages=stages, world_size=world_size, folder=plan_file(file).parent)
    if run_folder is not None:
        look_at_folder(plan, RunFolder(run_folder), look, start)
    return look


def told(look: Look, file: Path, overrides: Sequence[str]) -> list[str]:
    """The notes of a look, with the lines of the plan.

    Raises:
        PlanError: The look has found problems; names all of them.
    """
    locate = places_of(plan_file(file), overrides)
    look.refuse(locate)
    return lines(look.notes, locate)
