"""Changing a run: what may differ between two starts in one folder, and what becomes of it.

A stage's learning rate is a function of the plan and the step alone (``engine.step.schedule``). An amended stage
therefore goes on with the rate that the amended plan has at that step, as if it had held from the beginning;
``consequences`` says what that means before it happens. ``docs/plan.md`` has the table.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.disk.checkpoint import checkpoint_steps
from engine.disk.run_folder import (
    RunFolder,
    RunFolderError,
    check_same_plan,
    differing_fields,
    is_free,
    shown_change,
    write_whole,
)
from engine.plan.plan import SHARED_SECTIONS, Plan, StagePlan
from engine.plan.yaml import read_yaml
from engine.processes.files import read_json

_IN_STAGE = re.compile(r"stages\.(\d+)(?:\.(.+))?")

_OF_RUNNING_STAGES = re.compile(
    r"optimizer\.(?!betas|kind).*"
    r"|objectives\.\d+\.(weight|weight_warmup_steps)"
    r"|data\.\d+\.(weight|(augment|frames|prompts)\..*|caption|language)"
    r"|parallel\.precision"
)
"""Fields of a stage that act on each step by itself: weights, moments and the position in the data stay valid."""

_OF_THE_RUN = re.compile(r"loader\..*")
"""The same outside of stages."""

_LITTLE = 0.1
"""Mean learning rate of the steps that are left, over the peak, below which a message says so."""


@dataclass(frozen=True)
class _Standing:
    """How far a stage has come.

    Attributes:
        name: Its name.
        taken: Optimizer steps that are saved; None where it has not begun.
        complete: Whether it has ended.
        followed: Whether a later stage has begun.
    """

    name: str
    taken: int | None
    complete: bool
    followed: bool


Change = tuple[str, Any, Any]
"""Dotted path, value before, value now."""


def take_over(run: RunFolder, before: Plan, now: Plan, *, amend: bool, kept: int | None = None) -> list[Change]:
    """Compares a plan with the one in the folder. The caller holds the lock.

    Args:
        run: The run's folder.
        before: The plan that is there.
        now: The plan of this start.
        amend: Whether what may change in a run may differ, instead of what is free only.
        kept: Number of stages that stay if the others are deleted (``--fresh --stage``); None if none is.

    Returns:
        What differs and is not free.

    Raises:
        RunFolderError: Names every field that may not differ.
    """
    trees = [read_yaml(before.to_yaml()).tree, read_yaml(now.to_yaml()).tree]
    whole = [_resolved(tree, kept) for tree in trees]
    changes = [change for change in differing_fields(whole[0], whole[1]) if not is_free(change[0])]
    standings = _standings(run, whole[0])
    problems = [(change, why) for change in changes if (why := _problem(change, standings, whole[1])) is not None]
    if not amend:
        try:
            check_same_plan(run, *(trees if kept is None else whole))
        except RunFolderError as error:
            if problems:
                raise
            raise RunFolderError(f"{error}\nOr take these changes over: the same command with --amend.") from error
    elif problems:
        lines = "\n".join(f"  {shown_change(change)}: {why}" for change, why in problems)
        raise RunFolderError(
            f"{run.path}: --amend does not change these fields of a run:\n{lines}\nLeave them as they were "
            f"({run.plan}), start over with --fresh (deletes the earlier run), or choose another folder with "
            "--run-folder."
        )
    return changes


def consequences(run: RunFolder, before: Plan, now: Plan) -> Iterator[str]:
    """What becomes of stages that have begun and whose steps or optimizer differ: one or two messages for each."""
    for index, (old, new) in enumerate(zip(before.stages, now.stages, strict=False)):
        taken = _taken(run, index, new.name)
        if taken is None or (old.steps, old.optimizer) == (new.steps, new.optimizer) or taken >= new.steps:
            continue
        earlier, next_rate, last_rate = (
            stage.optimizer.learning_rate(step, stage.steps)
            for stage, step in ((old, taken), (new, taken), (new, new.steps - 1))
        )
        yield (
            f"stage {new.name}: amended after step {taken}: {new.steps - taken} steps are left of {new.steps} (were "
            f"{old.steps}); learning rate of the next step {next_rate:.3g} (by the earlier plan {earlier:.3g}), of the "
            f"last {last_rate:.3g}"
        )
        share = _mean_rate(new, taken) / new.optimizer.lr
        if share < _LITTLE:
            yield (
                f"stage {new.name}: warning: the steps that are left have {share:.1%} of optimizer.lr on average, as "
                f"the schedule ({new.optimizer.schedule} over {new.steps} steps) has nearly ended by then; for more, "
                f"give stages.{new.name}.steps a larger number, or optimizer.schedule=constant with the optimizer.lr "
                "that you want"
            )


def record(run: RunFolder, changes: Sequence[Change], now: Plan) -> None:
    """Adds what was changed to the run's record of changes, with the steps that its stages had taken."""
    if not changes:
        return
    remedy = "remove it: it only records what was changed"
    earlier = read_json(run.amendments, list, remedy) if run.amendments.is_file() else []
    steps = {stage.name: _taken(run, index, stage.name) for index, stage in enumerate(now.stages)}
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": {name: taken for name, taken in steps.items() if taken is not None},
        "changes": [{"field": field, "before": before, "now": new} for field, before, new in changes],
    }
    write_whole(run.amendments, json.dumps([*earlier, entry], indent=1))


def _mean_rate(stage: StagePlan, first: int) -> float:
    """Mean learning rate of the steps from ``first`` on, of a thousand of them where they are more."""
    steps = range(first, stage.steps, max(1, (stage.steps - first) // 1000))
    return sum(stage.optimizer.learning_rate(step, stage.steps) for step in steps) / len(steps)


def _problem(change: Change, standings: Sequence[_Standing], now: Mapping[str, Any]) -> str | None:
    """Why a field cannot change; None where it can."""
    field, before, value = change
    match = _IN_STAGE.fullmatch(field)
    if match is None:
        return None if _OF_THE_RUN.fullmatch(field) else "it holds for the whole run"
    index, inner = int(match[1]), match[2]
    stage = standings[index] if index < len(standings) else None
    if stage is None or stage.taken is None:
        return None
    if stage.followed:
        return f"a stage after {stage.name} has begun"
    if inner == "steps":
        return None if value > stage.taken else f"{stage.taken} steps are taken; give {stage.taken + 1} or more"
    if stage.complete and inner is not None and now["stages"][index]["steps"] <= stage.taken:
        return f"stage {stage.name} is complete, no step is left that it would act on; give it more steps as well"
    if inner is None or not _OF_RUNNING_STAGES.fullmatch(inner):
        return f"fixed when stage {stage.name} began; add a stage that starts from it instead (init_from)"
    if inner.startswith("data.") and inner.endswith(".weight") and 0 in (before, value):
        return "an entry cannot come or go; give it a small weight, or add a stage"
    return None


def _standings(run: RunFolder, tree: Mapping[str, Any]) -> list[_Standing]:
    """How far each stage of the plan in the folder has come."""
    names = [stage["name"] for stage in tree["stages"]]
    taken = [_taken(run, index, name) for index, name in enumerate(names)]
    return [
        _Standing(
            name,
            taken[index],
            run.stage(index, name).completed_steps() is not None,
            any(later is not None for later in taken[index + 1 :]),
        )
        for index, name in enumerate(names)
    ]


def _taken(run: RunFolder, index: int, name: str) -> int | None:
    folder = run.stage(index, name)
    if not folder.has_begun():
        return None
    return max([0, *checkpoint_steps(folder.checkpoints), folder.completed_steps() or 0])


def _resolved(tree: Mapping[str, Any], kept: int | None) -> dict[str, Any]:
    """A plan's tree in which every stage has its shared sections whole, with its first stages only."""
    stages = tree["stages"][:kept]
    shared = {name: tree[name] for name in SHARED_SECTIONS if name in tree}
    complete = [
        {**stage, **{name: {**section, **stage.get(name, {})} for name, section in shared.items()}} for stage in stages
    ]
    return {**{name: value for name, value in tree.items() if name not in SHARED_SECTIONS}, "stages": complete}
