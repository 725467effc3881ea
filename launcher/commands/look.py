"""The look at a plan's data, weights and tokenizers that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from engine.disk.run_folder import RunFolder
from engine.plan.places import places_of
from engine.plan.plan import Plan
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
    fresh: bool = False,
    stage: str | None = None,
) -> Look:
    """Looks at what a plan names outside of itself, from this machine. Streams are not opened.

    Args:
        plan: Without mistakes.
        file: Where it was read from.
        world_size: Number of processes.
        run_folder: Where the run will be written; None leaves it out.
        fresh: Whether what is there will be deleted.
        stage: The only stage that will run; None for all.
    """
    stages = None if stage is None else [index for index, one in enumerate(plan.stages) if one.name == stage]
    look = look_at(plan, stages=stages, world_size=world_size, folder=file.parent)
    if run_folder is not None:
        look_at_folder(plan, RunFolder(run_folder), look, fresh=fresh, stage=stage)
    return look


def told(look: Look, file: Path, overrides: Sequence[str]) -> list[str]:
    """The notes of a look, with the lines of the plan.

    Raises:
        PlanError: The look has found problems; names all of them.
    """
    locate = places_of(file, overrides)
    look.refuse(locate)
    return lines(look.notes, locate)
