"""Where a stage goes on: at its newest checkpoint, or, after a rollback, at an earlier one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from engine.disk.checkpoint import (
    SavedLayout,
    TrainerState,
    checkpoint_steps,
    find_fault_together,
    load_checkpoint,
    newest_complete,
    remove_leftovers,
)
from engine.disk.rollback import (
    Rollback,
    RolledBackError,
    position_in_data,
    read_rollbacks,
    remove_void,
    write_rollbacks,
)
from engine.disk.run_folder import StageFolder
from engine.hosts import Host
from engine.plan.plan import StagePlan
from engine.processes import ranks
from engine.run.assessment import Assessment
from engine.step.guard import GuardConfig, Trouble
from engine.telemetry.metrics import record_behind
from omnivl.data.loader import LoaderState
from omnivl.errors import UserError


class DivergedError(UserError):
    """Losses or gradients were not finite, or losses too high, in too many steps in a row."""


@dataclass(frozen=True)
class Found:
    """What an earlier start has left of a stage.

    Attributes:
        checkpoint: The newest whole one; None if there is none.
        rollbacks: All of the stage, oldest first.
    """

    checkpoint: Path | None
    rollbacks: tuple[Rollback, ...]


@dataclass(frozen=True)
class Resumption:
    """Where a stage goes on.

    Attributes:
        state: How far it has come.
        position: This process' place in the data; None for the beginning.
        rollbacks: All of the stage, oldest first.
        pending: Those that have returned to this checkpoint.
    """

    state: TrainerState
    position: LoaderState | None
    rollbacks: tuple[Rollback, ...]
    pending: tuple[Rollback, ...]


def find(folder: StageFolder, tell: Callable[[str], None]) -> Found:
    """Looks for where a stage goes on. Called by every process.

    Args:
        folder: The stage's. Checkpoints that a rollback has made void, and what is left of unfinished ones, are
            deleted.
        tell: Gets a message about each checkpoint that is passed over.
    """

    def look() -> tuple[list[int], tuple[Rollback, ...]]:
        remove_leftovers(folder.checkpoints)
        rollbacks = read_rollbacks(folder.rollbacks)
        remove_void(folder.checkpoints, rollbacks)
        return checkpoint_steps(folder.checkpoints), rollbacks

    steps, rollbacks = ranks.on_first(look, tuple[list[int], tuple[Rollback, ...]])
    found = newest_complete(folder.checkpoints, tell, steps=steps, find=find_fault_together)
    return Found(found, rollbacks)


def resume(
    found: Found,
    folder: StageFolder,
    host: Host,
    layout: SavedLayout,
    assessment: Assessment,
    tell: Callable[[str], None],
) -> Resumption:
    """Restores a checkpoint into the host, if there is one. Called by every process.

    Args:
        found: What there is.
        folder: The stage's.
        host: Holds the chain.
        layout: This run's.
        assessment: Judges a figure that was still to come when the checkpoint was taken.
        tell: Gets a message where the layout has changed.

    Raises:
        CheckpointError: The checkpoint does not fit the model.
    """
    checkpoint, rollbacks = found.checkpoint, found.rollbacks
    state = TrainerState(layout=layout)
    position: Mapping[str, Any] | None = None
    if checkpoint is not None:
        saved, position = load_checkpoint(checkpoint, host, layout, tell)
        state = _with_figures(_judged_by(replace(saved, layout=layout), assessment), folder, assessment)
    pending = rollbacks[state.rollbacks :]
    position = position_in_data(pending, ranks.rank(), ranks.world_size()) or position
    return Resumption(state, None if position is None else LoaderState.from_json(position), rollbacks, pending)


def go_back(
    stage: StagePlan,
    folder: StageFolder,
    guard: GuardConfig,
    rollbacks: tuple[Rollback, ...],
    trouble: Trouble,
    step: int,
    position: LoaderState,
) -> NoReturn:
    """Records a rollback, from which ``resume`` then goes on. Called by every process.

    Args:
        stage: Which stage.
        folder: Where it writes.
        guard: Says how many rollbacks are allowed, and whether they leave data out.
        rollbacks: Those before.
        trouble: Why it goes back.
        step: Optimizer steps taken.
        position: This process' place in the data.

    Raises:
        RolledBackError: Always, unless the plan allows no more rollbacks.
        DivergedError: It allows no more.
    """
    if len(rollbacks) >= guard.rollbacks:
        good = "The weights are those of the last good step. " if trouble.skipped else ""
        after = f", after as many rollbacks as guard.rollbacks allows ({guard.rollbacks})" if rollbacks else ""
        raise DivergedError(
            f"stage {stage.name}, step {step}: {trouble.what}{after}. {good}Lower "
            f"stages.{stage.name}.optimizer.lr (now {stage.optimizer.lr:g}), lengthen its warm-up, set "
            "gradient_clipping, use precision fp32, or allow more guard.rollbacks, and give --amend to the command."
        )
    places = ranks.gather(position.to_json(), Mapping[str, Any]) if guard.skip_data else []
    rollback = Rollback(trouble.first_bad, step, trouble.what, tuple(places))
    ranks.on_first(lambda: write_rollbacks(folder.rollbacks, (*rollbacks, rollback)))
    raise RolledBackError(rollback, len(rollbacks) + 1, guard.rollbacks)


def _judged_by(state: TrainerState, assessment: Assessment) -> TrainerState:
    """Forgets the best figure where it is one of another kind: the plan may name another between two starts."""
    if state.best_of is None or assessment.best_of in (None, state.best_of):
        return state
    return replace(state, best=None, best_step=None, best_of=None)


def _with_figures(state: TrainerState, folder: StageFolder, assessment: Assessment) -> TrainerState:
    """Takes over the evaluation that was still to come at a checkpoint, where it stands in the metrics by now."""
    if not state.evaluation_due:
        return state
    found = ranks.on_first(
        lambda: record_behind(folder.metrics, state.metrics_bytes), tuple[dict[str, Any], int] | None
    )
    if found is None or (found[0]["event"], found[0]["step"]) != ("evaluation", state.step):
        return state
    record, end = found
    figure = assessment.better(record["scores"], state.best)
    return replace(state.evaluated(figure, assessment.best_of), metrics_bytes=end)
