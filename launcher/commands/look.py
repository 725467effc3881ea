"""The look at a plan's data, weights and tokenizers that several commands share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from engine.disk.run_folder import RunFolder
from engine.errors import PlanError
from engine.plan.parse import plan_file
from engine.plan.places import places_of
from engine.plan.plan import Plan
from engine.run.earlier import Start
from engine.run.preflight import Glances, Look, look_at
from engine.run.preflight.findings import lines
from engine.run.preflight.folder import look_at_folder
from engine.sweep.config import Point, Sweep

_SHOWN_RUNS = 3

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
    glances: Glances | None = None,
) -> Look:
    """Looks at what a plan names outside of itself, from this machine. Streams are not opened.

    Args:
        plan: Without mistakes.
        file: Where it was read from; also the folder of a run.
        world_size: Number of processes.
        run_folder: Where the run will be written; None leaves it out.
        start: How the run will be started there.
        glances: See ``look_at``.
    """
    stages = None if start.stage is None else [i for i, one in enumerate(plan.stages) if one.name == start.stage]
    look = look_at(plan, stages=stages, world_size=world_size, folder=plan_file(file).parent, glances=glances)
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


def told_of_runs(sweep: Sweep, runs: Sequence[tuple[Point, Plan, int]], folder: Path) -> list[str]:
    """Looks at the runs of a sweep: what is found in several of them is told once.

    Args:
        sweep: The sweep.
        runs: The runs, each with its plan and its number of processes.
        folder: Of their folders.

    Returns:
        The notes, with the lines of the base plan.

    Raises:
        PlanError: Names all problems.
    """
    problems: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    glances = Glances()
    for point, plan, processes in runs:
        look = look_from_here(plan, point.base, processes, run_folder=folder / point.name, glances=glances)
        locate = places_of(point.base, point.overrides)
        for kept, findings in ((problems, look.problems), (notes, look.notes)):
            for line in lines(findings, locate):
                kept.setdefault(line, []).append(point.name)
    if problems:
        raise PlanError(_named(problems, len(runs)))
    return _named(notes, len(runs))


def _named(found: Mapping[str, Sequence[str]], runs: int) -> list[str]:
    """Lines with the names of the runs that they are about, unless that is all of several."""
    told = []
    for line, names in found.items():
        more = f" and {len(names) - _SHOWN_RUNS} more" if len(names) > _SHOWN_RUNS else ""
        which = f"run{'s' if len(names) > 1 else ''} {', '.join(names[:_SHOWN_RUNS])}{more}"
        told.append(line if len(names) == runs > 1 else f"{which}: {line}")
    return told
