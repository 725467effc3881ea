"""The start of a run in its folder: what an earlier start left is compared, what all stages read is looked at."""

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.disk.run_folder import RunFolder, write_whole
from engine.errors import PlanError
from engine.plan.epochs import described, with_steps
from engine.plan.parallel import Precision
from engine.plan.places import places_of
from engine.plan.plan import Plan
from engine.plan.precision import faster_precision, with_precision
from engine.plan.warnings import warnings_of
from engine.plan.yaml import show_path
from engine.processes import ranks
from engine.processes.files import remove_folder
from engine.run.amendment import record
from engine.run.automatic import as_before, with_layouts
from engine.run.earlier import Earlier, Start, is_done
from engine.run.preflight import Glances, look_at
from engine.run.preflight.findings import lines, under_heading
from engine.telemetry.environment import describe_environment
from moe.ranges import AUTO


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line in addition to the plan.

    Attributes:
        folder: The run's folder.
        start: How the run is started there.
        offline: Do not look at the data and the weights of all stages before the first one begins.
        plan_file: Where the plan was read from, for messages.
        overrides: What it was read with.
    """

    folder: Path
    start: Start = field(default_factory=Start)
    offline: bool = False
    plan_file: Path | None = None
    overrides: tuple[str, ...] = ()


def enter(run: RunFolder, plan: Plan, options: RunOptions, device: torch.device) -> tuple[Plan, list[str]]:
    """Makes the folder the plan's. Called by every process; rank 0 holds the folder's lock.

    Args:
        run: The folder.
        plan: Without mistakes.
        options: How the run is started.
        device: Where this process computes.

    Returns:
        The plan with nothing left open: precision, layouts, steps of stages with ``epochs``. And what to say.

    Raises:
        UserError: The folder holds another run, or something that a stage reads is not there or does not fit. Nothing
            is deleted or written then.
    """
    earlier = Earlier(run)  # rank 0 alone reads it
    plan, chosen = _choose_precision(plan, earlier, options, device)
    kept = ranks.on_first(functools.partial(earlier.kept_steps, plan, options.start), dict[str, int])
    notes = [] if chosen is None else [f"parallel.precision: auto takes {chosen}, which this machine multiplies faster"]
    epochs, plan = _epoch_notes(plan, kept), with_steps(plan, kept)
    glances = Glances()
    if any(stage.parallel.host == AUTO for stage in plan.stages):
        # Layouts are searched for a while: what is wrong beside them is said before.
        ranks.on_first(functools.partial(_refuse, run, earlier, plan, options, glances), bool)
    plan, taken = with_layouts(plan, earlier, options.start, device)
    notes += [*taken, *warnings_of(plan), *epochs]
    notes += ranks.on_first(lambda: look_ahead(run, plan, options, glances), list[str])
    notes += ranks.on_first(functools.partial(_enter_folder, run, earlier, plan, options), list[str])
    return plan, notes


def look_ahead(run: RunFolder, plan: Plan, options: RunOptions, glances: Glances | None = None) -> list[str]:
    """Looks at what the stages that are still to run read, all of them.

    Args:
        run: The folder.
        plan: With steps for every stage.
        options: How the run is started.
        glances: What has opened sources before; None: nothing has.

    Returns:
        What to say about it, as ``omnivl check`` says it.

    Raises:
        PlanError: Names all that is wrong.
    """
    if options.offline:
        return []
    due = [
        index
        for index, stage in enumerate(plan.stages)
        if options.start.stage in (None, stage.name)
        and (options.start.fresh or not is_done(run.stage(index, stage.name), stage))
    ]
    if not due:
        return []
    file = options.plan_file
    folder = None if file is None else file.parent
    size = ranks.world_size()
    seen = look_at(plan, stages=due, world_size=size, open_streams=True, folder=folder, glances=glances)
    locate = show_path if file is None else places_of(file, options.overrides)
    seen.refuse(locate)
    return under_heading(lines(seen.notes, locate))


def _refuse(run: RunFolder, earlier: Earlier, plan: Plan, options: RunOptions, glances: Glances) -> bool:
    """Raises what speaks against a run whose layouts are still open; ``glances`` keeps the sources that it opens."""
    _check_stage(plan, options.start)
    earlier.goes_on(as_before(plan, earlier), options.start)
    look_ahead(run, plan, options, glances)
    return True


def _check_stage(plan: Plan, start: Start) -> None:
    names = [stage.name for stage in plan.stages]
    if start.stage is not None and start.stage not in names:
        raise PlanError([f"--stage: got {start.stage!r}; allowed are {', '.join(names)}; name one of them"])


def _enter_folder(run: RunFolder, earlier: Earlier, plan: Plan, options: RunOptions) -> list[str]:
    """Checks that the folder holds this run or none, and writes plan and environment into it.

    Returns:
        What to say about stages that go on otherwise than they began.
    """
    _check_stage(plan, options.start)
    changes, messages = earlier.goes_on(plan, options.start)
    with contextlib.suppress(OSError):
        remove_folder(run.heartbeats)
    if options.start.fresh:
        run.clear(options.start.kept(plan) or 0)
    write_whole(run.plan, plan.to_yaml())
    record(run, changes, plan)
    write_whole(run.environment, json.dumps(describe_environment(ranks.world_size()), indent=1))
    return messages


def _choose_precision(
    plan: Plan, earlier: Earlier, options: RunOptions, device: torch.device
) -> tuple[Plan, Precision | None]:
    """The plan with every ``auto`` replaced, and the type that replaced it; stages that have begun keep theirs."""
    if all(stage.parallel.precision != "auto" for stage in plan.stages):
        return plan, None
    kind = tuple[Precision, dict[str, Precision]] | None
    known = ranks.on_first(functools.partial(earlier.precision, options.start), kind)
    if known is None:
        faster = faster_precision(device)
        return with_precision(plan, faster), faster
    return with_precision(plan, *known), None


def _epoch_notes(plan: Plan, kept: Mapping[str, int]) -> list[str]:
    """How the steps of the stages with ``epochs`` came about, and where a stage goes on with others."""
    notes = []
    for stage in plan.stages:
        if stage.epochs is None:
            continue
        told = described(stage, plan.loader, stage.samples_per_step(ranks.world_size()))
        steps = kept.get(stage.name, stage.steps)
        other = f"; it goes on with the {steps:,} steps that it began with (--amend changes them)"
        notes.append(f"stage {stage.name}: {told}{other if steps != stage.steps else ''}")
    return notes
