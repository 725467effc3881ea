"""What an earlier start of a run has left in its folder, and whether a plan goes on with it."""

import os
from dataclasses import dataclass
from functools import cached_property

from engine.disk.checkpoint import checkpoint_steps
from engine.disk.evaluation import read_failed
from engine.disk.run_folder import RunFolder, StageFolder, check_same_plan
from engine.errors import PlanError, RunFileError
from engine.plan.parallel import Precision
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan, StagePlan
from engine.plan.yaml import read_yaml
from engine.processes.files import read_json, read_whole
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

    @property
    def anew(self) -> bool:
        """Whether nothing stays of what an earlier start left."""
        return self.fresh and self.stage is None

    def kept(self, plan: Plan) -> int | None:
        """Number of stages that stay while the others are deleted; None if nothing is deleted."""
        if not self.fresh:
            return None
        return 0 if self.stage is None else [stage.name for stage in plan.stages].index(self.stage)


class Earlier:
    """The run that an earlier start has left in a folder, if there is one. Its plan is read once, when it is needed."""

    def __init__(self, run: RunFolder) -> None:
        """Reads nothing.

        Args:
            run: The folder, which need not exist.
        """
        self._run = run

    @cached_property
    def plan(self) -> Plan | None:
        """The plan, with this version's defaults for fields that the run's version did not have.

        None if there is none, or if this version cannot read it: ``goes_on`` then names the differences.

        Raises:
            RunFileError: The file cannot be read.
        """
        if self._text is None:
            return None
        try:
            return parse_plan(self._text, str(self._run.plan))
        except PlanError:
            return None

    @property
    def processes(self) -> int | None:
        """On how many processes it was started last; None where nothing says so."""
        path = self._run.environment
        return read_json(path, dict, "remove it").get("processes") if path.is_file() else None

    @cached_property
    def _text(self) -> str | None:
        path = self._run.plan
        if not os.path.lexists(path):
            return None
        try:
            return read_whole(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunFileError(
                f"{path}: got a file that cannot be read ({reason_of(error)}); remove it, if the plan is still the one "
                "that the run began with: the same command writes it anew"
            ) from error

    def precision(self, start: Start) -> tuple[Precision, dict[str, Precision]] | None:
        """The types that it computes in: of the whole plan, and of its stages by their names; None where none stay."""
        if start.anew or (plan := self.plan) is None:
            return None
        return plan.parallel.precision, {stage.name: stage.parallel.precision for stage in plan.stages}

    def goes_on(self, plan: Plan, start: Start) -> tuple[list[Change], list[str]]:
        """Compares a plan with it. Writes nothing.

        Args:
            plan: Without ``auto`` as a precision.
            start: What is deleted first, and whether the plan may change the run.

        Returns:
            What the plan changes, and what to say about stages that go on otherwise than they began.

        Raises:
            RunFolderError: Names every field that may not differ.
        """
        kept = start.kept(plan)
        if kept == 0 or self._text is None:
            return [], []
        if self.plan is None:
            before = read_yaml(self._text, str(self._run.plan)).tree
            check_same_plan(self._run, before if isinstance(before, dict) else {}, read_yaml(plan.to_yaml()).tree)
            return [], []
        changes = take_over(self._run, self.plan, plan, amend=start.amend, kept=kept)
        return changes, [] if kept is not None else list(consequences(self._run, self.plan, plan))

    def kept_steps(self, plan: Plan, start: Start) -> dict[str, int]:
        """Steps of the stages with ``epochs`` that have begun: they stay what they were, whatever an epoch is now."""
        if start.amend or start.anew or self.plan is None:
            return {}
        begun = {
            stage.name: stage.steps
            for index, stage in enumerate(self.plan.stages)
            if self._run.stage(index, stage.name).has_begun() and not (start.fresh and stage.name == start.stage)
        }
        return {one.name: begun[one.name] for one in plan.stages if one.epochs is not None and one.name in begun}


def is_done(folder: StageFolder, stage: StagePlan) -> bool:
    """Whether nothing is left to do: the stage is complete, and its evaluation too, has failed, or cannot be done."""
    if (folder.completed_steps() or -1) < stage.steps:
        return False
    due = folder.awaits_evaluation() and stage.steps not in read_failed(folder.unevaluated)
    return not (due and stage.evaluate.tasks and stage.steps in checkpoint_steps(folder.checkpoints))
