"""Rules that compare several fields of a plan. Each is one small function that yields problems.

Rules look at a ``Draft``, which may lack the parts that could not be typed, so that one run reports everything.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from engine.plan.batches import divisors_around
from engine.plan.evaluation import possible_kinds, provided_by
from engine.plan.parallel import LaunchConfig
from engine.plan.plan import EvaluationPlan, StagePlan
from engine.plan.stage_rules import STAGE_RULES, label_prompts
from engine.plan.yaml import Path, Problem, show_value
from omnivl.errors import did_you_mean
from omnivl.tasks import TaskConfig
from omnivl.tasks.zero_shot import ZeroShotTask

_MOST_CHARACTERS = 100

NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_MOST_CHARACTERS - 1}}}")
"""Of runs and stages, which give folders their names."""

TITLE = re.compile(r"[^\W_][\w .,:;+()>-]{0,99}")
"""Of data entries and tasks, which stand in logs, tables and pages."""


@dataclass(frozen=True)
class Draft:
    """A plan of which some parts may be missing.

    Attributes:
        sections: The plan's own sections by name, as far as they could be typed.
        stages: Typed stages by index.
        names: The value of ``name`` in each stage, typed or not.
        parents: The value of ``init_from`` in each stage.
        world_size: Number of processes of the run; None where it is not known.
    """

    sections: Mapping[str, Any]
    stages: Mapping[int, StagePlan]
    names: tuple[Any, ...]
    parents: tuple[Any, ...]
    world_size: int | None = None

    @property
    def processes(self) -> int | None:
        """Number of processes of the run, given or from the plan; None if neither is known."""
        launch = self.sections.get("launch")
        if self.world_size is None and isinstance(launch, LaunchConfig) and launch.processes != "auto":
            return launch.processes
        return self.world_size

    def ancestors(self, index: int) -> list[StagePlan]:
        """The typed stages that stage ``index`` descends from, nearest first."""
        found: list[StagePlan] = []
        parent = self.parents[index]
        while parent in self.names[:index]:
            index = self.names.index(parent)
            if index in self.stages:
                found.append(self.stages[index])
            parent = self.parents[index]
        return found


Rule = Callable[[Draft], Iterator[Problem]]

_TITLES = "letters, digits, spaces and . , : ; + - _ > ( ), a letter or digit first, at most 100"


def names_are_file_names(draft: Draft) -> Iterator[Problem]:
    """The run and its stages give folders their names."""
    named = [(("name",), draft.sections.get("name"))]
    named += [(("stages", index, "name"), name) for index, name in enumerate(draft.names)]  # type: ignore[misc]
    for path, name in named:
        if isinstance(name, str) and NAME.fullmatch(name) is None:
            allowed = "letters, digits, '-', '_' and '.', a letter or digit first: it names a folder"
            allowed += "" if len(name) <= _MOST_CHARACTERS else f", at most {_MOST_CHARACTERS} characters"
            yield Problem(path, repr(name), allowed, "change the name")


def there_is_a_stage(draft: Draft) -> Iterator[Problem]:
    """A plan without stages does nothing."""
    if not draft.names:
        yield Problem(("stages",), "no stage", "one stage or more", "add a stage with name, steps, data and objectives")


def stage_names_differ(draft: Draft) -> Iterator[Problem]:
    """``init_from`` and folders tell stages apart by name."""
    for index, name in enumerate(draft.names):
        if isinstance(name, str) and name in draft.names[:index]:
            got = f"{name!r}, which stages.{draft.names.index(name)} is called as well"
            yield Problem(("stages", index, "name"), got, "a name for each stage", "rename one of the two")


def stages_start_from_earlier_ones(draft: Draft) -> Iterator[Problem]:
    """``init_from`` names a stage that has run by then."""
    for index, parent in enumerate(draft.parents):
        if not isinstance(parent, str) or parent in draft.names[:index]:
            continue
        earlier = [name for name in draft.names[:index] if isinstance(name, str)]
        got = repr(parent)
        change = did_you_mean(parent, earlier, "name an earlier stage" if earlier else "remove init_from")
        if parent == draft.names[index]:
            got += ", this stage itself"
        elif parent in draft.names:
            got += ", which comes later"
            change = "name an earlier stage or change the order" if earlier else "change the order of the stages"
        allowed = ", ".join(map(repr, earlier)) if earlier else "nothing, there is no earlier stage"
        yield Problem(("stages", index, "init_from"), got, allowed, change)


def widths_survive_the_hand_over(draft: Draft) -> Iterator[Problem]:
    """A stage can change depths, frames and picture sizes of the weights that it starts from, but no widths."""
    for index, stage in draft.stages.items():
        for parent in draft.ancestors(index)[:1]:
            for name, here in stage.model.widths.items():
                there = parent.model.widths.get(name, here)
                if here != there:
                    got = f"{show_value(here)} for weights of stage {parent.name!r} with {show_value(there)}"
                    change = f"set both to the same {name}, or remove init_from"
                    yield Problem(("stages", index, "model", *name.split(".")), got, show_value(there), change)


def titles_are_plain(draft: Draft) -> Iterator[Problem]:
    """Names that stand in logs, tables and pages are made of what reads the same in each of them."""
    for index, stage in draft.stages.items():
        for place, entry in enumerate(stage.data):
            if entry.name is not None and TITLE.fullmatch(entry.name) is None:
                yield Problem(("stages", index, "data", place, "name"), repr(entry.name), _TITLES, "change the name")
        for at, tasks in stage.evaluate.lists:
            yield from tasks_are_told_apart(tasks, ("stages", index, "evaluate", *at))


def tasks_are_told_apart(tasks: Sequence[TaskConfig], path: Path) -> Iterator[Problem]:
    """Every task of a stage has a name of its own, and prompts that hold what is put into them.

    Args:
        tasks: Of one stage, or of one evaluation.
        path: Where they stand.
    """
    names = [task.name for task in tasks]
    for place, task in enumerate(tasks):
        if TITLE.fullmatch(task.name) is None:
            yield Problem((*path, place, "name"), repr(task.name), _TITLES, "change the name")
        elif task.name in names[:place]:
            got = f"{task.name!r}, which tasks.{names.index(task.name)} is called as well"
            yield Problem((*path, place, "name"), got, "a name for each task", "give one of the two another 'name'")
        if isinstance(task, ZeroShotTask):
            yield from label_prompts(task.prompts, (*path, place, "prompts"), ("label", "name"))


def best_is_a_figure(draft: Draft) -> Iterator[Problem]:
    """The figure that says which checkpoint is best is one of a task of each stage that is evaluated."""
    checkpoint = draft.sections.get("checkpoint")
    shared, path = getattr(checkpoint, "keep_best", None), ("checkpoint", "keep_best")
    evaluated = {index: stage.evaluate for index, stage in draft.stages.items() if stage.evaluate.tasks}
    if shared is not None and draft.stages and not evaluated:
        yield Problem(path, repr(shared), "null where no stage is evaluated", "add a task, or remove it")
    if shared is not None:
        found = (_figure_problem(shared, index, one, path) for index, one in evaluated.items() if not one.keep_best)
        yield from [problem for problem in found if problem is not None][:1]
    own = {index: stage.evaluate for index, stage in draft.stages.items() if stage.evaluate.keep_best is not None}
    for index, one in own.items():
        assert one.keep_best is not None
        problem = _figure_problem(one.keep_best, index, one, ("stages", index, "evaluate", "keep_best"))
        yield from [] if problem is None else [problem]
    if checkpoint is not None and shared is None and not own and checkpoint.best_is != "auto":
        got = f"{checkpoint.best_is!r} without keep_best"
        yield Problem(("checkpoint", "best_is"), got, "'auto'", "name the figure in keep_best, or remove it")


def _figure_problem(wanted: str, index: int, evaluate: EvaluationPlan, path: Path) -> Problem | None:
    """Why a figure is none of those that a stage is evaluated by; None if it is one."""
    tasks, (name, _, figure) = evaluate.tasks, wanted.partition("/")
    if not tasks:
        return Problem(path, repr(wanted), "null where the stage is not evaluated", "add a task, or remove it")
    named = next((task for task in tasks if task.name == name), None)
    if named is None or not figure:
        allowed = ", ".join(f"'{task.name}/FIGURE'" for task in tasks)
        got = f"{wanted!r}, which is no figure of a task of stages.{index}"
        return Problem(path, got, allowed, "name a figure of a task, or null")
    if any(fnmatchcase(figure, one) for one in named.figures):
        return None
    known = [f"{name}/{one}" for one in named.figures]
    got = f"{wanted!r}, which is no figure that task {name!r} of stages.{index} makes"
    return Problem(path, got, ", ".join(map(repr, known)), did_you_mean(wanted, known, "name one of them, or null"))


def tasks_can_be_done(draft: Draft) -> Iterator[Problem]:
    """Stages have what the tasks that they are evaluated by need."""
    for index, stage in draft.stages.items():
        provided = provided_by(stage, draft.ancestors(index))
        listed = [(at, i, task) for at, tasks in stage.evaluate.lists for i, task in enumerate(tasks)]
        for at, place, task in listed:
            path: Path = ("stages", index, "evaluate", *at, place)
            for lack in task.lacks(provided):
                if lack.option is None:
                    got = f"{task.kind!r} for a stage that {lack.what}"
                    allowed = ", ".join(map(repr, possible_kinds(provided))) or "no task"
                    yield Problem((*path, "kind"), got, allowed, f"{lack.remedy}, or remove the task")
                else:
                    got = f"{show_value(getattr(task, lack.option))} for a stage that {lack.what}"
                    allowed = show_value(lack.without)
                    change = f"{lack.remedy}, or set {lack.option} to {allowed}"
                    yield Problem((*path, lack.option), got, allowed, change)


def hangs_take_a_while(draft: Draft) -> Iterator[Problem]:
    """A step, a checkpoint or an evaluation takes a while, and so does writing down the stack traces."""
    seconds = getattr(draft.sections.get("guard"), "hang_seconds", 0)
    if 0 < seconds < 1:
        yield Problem(("guard", "hang_seconds"), f"{seconds:g}", "0, or 1 or more", "change the number")


def batches_add_up(draft: Draft) -> Iterator[Problem]:
    """``global_batch_size`` is micro batch x accumulation x processes."""
    world_size = draft.processes
    for index, stage in draft.stages.items():
        wanted, local = stage.batch.global_batch_size, stage.samples_per_replica
        if wanted is None or local < 1:
            continue
        sizes = f"micro_batch_size_per_gpu {stage.batch.micro_batch_size_per_gpu}"
        sizes += f" x gradient_accumulation_steps {stage.batch.gradient_accumulation_steps}"
        path: Path = ("stages", index, "batch", "global_batch_size")
        if world_size is not None and wanted != stage.samples_per_step(world_size):
            what = "replicas of a pipeline stage" if stage.parallel.host == "pipeline" else "processes"
            replicas = stage.parallel.replicas(world_size)
            if wanted % replicas:
                change = f"take {' or '.join(map(str, divisors_around(wanted, replicas)))} {what}, or another batch"
                yield Problem(path, f"{wanted} for {replicas} {what}", f"a multiple of {replicas}", change)
                continue
            allowed = f"{local * replicas} = {sizes} x {replicas} {what}"
            yield Problem(path, str(wanted), allowed, "change one of the three, or leave global_batch_size out")
        elif world_size is None and wanted % local:
            allowed = f"a multiple of {local} = {sizes}"
            yield Problem(path, str(wanted), allowed, "change one of the three, or leave global_batch_size out")


def processes_fill_the_pipeline(draft: Draft) -> Iterator[Problem]:
    """Every stage of a pipeline has equally many replicas."""
    for index, stage in draft.stages.items():
        stages = stage.parallel.pipeline_stages
        if stage.parallel.host == "pipeline" and draft.processes is not None and draft.processes % stages != 0:
            path: Path = ("stages", index, "parallel", "pipeline_stages")
            got = f"{stages} for {draft.processes} processes"
            yield Problem(path, got, "a divisor of their number", "change it, or launch.processes")


def processes_hold_whole_banks(draft: Draft) -> Iterator[Problem]:
    """The processes, of a pipeline those of a stage, fall into groups that hold one copy of every bank each."""
    for index, stage in draft.stages.items():
        size = stage.parallel.expert_parallel_size
        if draft.processes is None or size == "auto" or size <= 1:
            continue
        replicas = stage.parallel.replicas(draft.processes)
        if replicas % size != 0:
            path: Path = ("stages", index, "parallel", "expert_parallel_size")
            of = " of each pipeline stage" if stage.parallel.host == "pipeline" else ""
            got = f"{size} for {replicas} processes{of}"
            yield Problem(path, got, "a divisor of their number", "change it, or launch.processes")


def stages_hold_together(draft: Draft) -> Iterator[Problem]:
    """The rules about single stages."""
    for index, stage in draft.stages.items():
        for rule in STAGE_RULES:
            for problem in rule(stage):
                yield dataclasses.replace(problem, path=("stages", index, *problem.path))


RULES: tuple[Rule, ...] = (
    names_are_file_names,
    there_is_a_stage,
    stage_names_differ,
    stages_start_from_earlier_ones,
    widths_survive_the_hand_over,
    stages_hold_together,
    titles_are_plain,
    tasks_can_be_done,
    best_is_a_figure,
    hangs_take_a_while,
    batches_add_up,
    processes_hold_whole_banks,
    processes_fill_the_pipeline,
)
