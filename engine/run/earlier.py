"""What an earlier start of a run has left in its folder, and whether a plan goes on with it."""

from engine.disk.checkpoint import checkpoint_steps
from engine.disk.evaluation import read_failed
from engine.disk.run_folder import RunFolder, StageFolder, check_same_plan
from engine.errors import PlanError
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan, StagePlan
from engine.plan.precision import with_precision
from engine.plan.yaml import read_yaml


def earlier_plan(run: RunFolder) -> Plan | None:
    """The plan of the run in the folder, with this version's defaults for fields that the run's version did not have.

    None if there is none, or if this version cannot read it: the comparison of plans then names the differences.
    """
    try:
        return parse_plan(run.plan.read_text(encoding="utf-8"), str(run.plan)) if run.plan.is_file() else None
    except PlanError:
        return None


def with_precision_of(plan: Plan, earlier: Plan) -> Plan:
    """The plan with every ``auto`` replaced by what it became in an earlier start."""
    known = {stage.name: stage.parallel.precision for stage in earlier.stages}
    return with_precision(plan, earlier.parallel.precision, known)


def check_goes_on(run: RunFolder, plan: Plan) -> None:
    """Refuses a plan that differs from that of the run in the folder, if there is one.

    Args:
        run: The folder.
        plan: Without ``auto`` as a precision.

    Raises:
        RunFolderError: Names every difference.
    """
    if run.plan.is_file():
        earlier = earlier_plan(run)
        before = run.plan.read_text(encoding="utf-8") if earlier is None else earlier.to_yaml()
        check_same_plan(run, read_yaml(before, str(run.plan)).tree, read_yaml(plan.to_yaml()).tree)


def is_done(folder: StageFolder, stage: StagePlan) -> bool:
    """Whether nothing is left to do: the stage is complete, and its evaluation too, has failed, or cannot be done."""
    if (folder.completed_steps() or -1) < stage.steps:
        return False
    due = folder.awaits_evaluation() and stage.steps not in read_failed(folder.unevaluated)
    return not (due and stage.evaluate.tasks and stage.steps in checkpoint_steps(folder.checkpoints))
