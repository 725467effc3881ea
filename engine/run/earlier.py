"""What an earlier start of a run has left in its folder, and whether a plan goes on with it."""

import os
from dataclasses import dataclass
from pathlib import Path

from engine.disk.checkpoint import checkpoint_steps
from engine.disk.evaluation import read_failed
from engine.disk.run_folder import RunFolder, StageFolder, check_same_plan
from engine.errors import PlanError, RunFileError
from engine.plan.parallel import Precision
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan, StagePlan
from engine.plan.yaml import read_yaml
from engine.processes.files import read_whole
from engine.run.amendment import Change, consequences, take_over
from omnivl.errors import reason_of


@dataclass(frozen=True)
class Start:
    """How a run is started in its folder.

    Attributes:
        fresh: Delete what an earlier start left there: all of it, or ``stage`` and what follows it.
        stage: Run this stage only; None runs all.
        amend: Take over what the plan changes in a run that has begun, where that may change.
    """

    fresh: bool = False
    stage: str | None = None
    amend: bool = False

    def kept(self, plan: Plan) -> int | None:
        """Number of stages that stay while the others are deleted; None if nothing is deleted."""
        if not self.fresh:
            return None
        return 0 if self.stage is None else [stage.name for stage in plan.stages].index(self.stage)


def earlier_plan(run: RunFolder) -> Plan | None:
    """The plan of the run in the folder, with this version's defaults for fields that the run's version did not have.

    None if there is none, or if this version cannot read it: the comparison of plans then names the differences.
    """
    if not os.path.lexists(run.plan):
        return None
    text = _plan_text(run.plan)
    try:
        return parse_plan(text, str(run.plan))
    except PlanError:
        return None


def earlier_precision(run: RunFolder) -> tuple[Precision, dict[str, Precision]] | None:
    """The types of the run in the folder: of the whole plan, and of its stages by their names; see ``earlier_plan``."""
    if (earlier := earlier_plan(run)) is None:
        return None
    return earlier.parallel.precision, {stage.name: stage.parallel.precision for stage in earlier.stages}


def goes_on(run: RunFolder, plan: Plan, start: Start) -> tuple[list[Change], list[str]]:
    """Compares a plan with that of the run in the folder, if there is one. Writes nothing.

    Args:
        run: The folder.
        plan: Without ``auto`` as a precision.
        start: What is deleted first, and whether the plan may change the run.

    Returns:
        What the plan changes, and what to say about stages that go on otherwise than they began.

    Raises:
        RunFolderError: Names every field that may not differ.
    """
    kept = start.kept(plan)
    if not os.path.lexists(run.plan) or kept == 0:
        return [], []
    earlier = earlier_plan(run)
    if earlier is None:
        before = read_yaml(_plan_text(run.plan), str(run.plan)).tree
        check_same_plan(run, before if isinstance(before, dict) else {}, read_yaml(plan.to_yaml()).tree)
        return [], []
    changes = take_over(run, earlier, plan, amend=start.amend, kept=kept)
    return changes, [] if kept is not None else list(consequences(run, earlier, plan))


def kept_steps(run: RunFolder, plan: Plan, start: Start) -> dict[str, int]:
    """Steps of the stages with ``epochs`` that have begun: they stay what they were, whatever an epoch is now."""
    earlier = None if start.amend else earlier_plan(run)
    if earlier is None or (start.fresh and start.stage is None):
        return {}
    begun = {
        stage.name: stage.steps
        for index, stage in enumerate(earlier.stages)
        if run.stage(index, stage.name).has_begun() and not (start.fresh and stage.name == start.stage)
    }
    return {stage.name: begun[stage.name] for stage in plan.stages if stage.epochs is not None and stage.name in begun}


def is_done(folder: StageFolder, stage: StagePlan) -> bool:
    """Whether nothing is left to do: the stage is complete, and its evaluation too, has failed, or cannot be done."""
    if (folder.completed_steps() or -1) < stage.steps:
        return False
    due = folder.awaits_evaluation() and stage.steps not in read_failed(folder.unevaluated)
    return not (due and stage.evaluate.tasks and stage.steps in checkpoint_steps(folder.checkpoints))


def _plan_text(path: Path) -> str:
    try:
        return read_whole(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(
            f"{path}: got a file that cannot be read ({reason_of(error)}); remove it, if the plan is still the one "
            "that the run began with: the same command writes it anew"
        ) from error
