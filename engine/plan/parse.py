"""From YAML text to a ``Plan``: the only place where plans are parsed.

text -> tree with line numbers -> overrides -> shared sections put into each stage -> fields of earlier plans moved to
where they stand today -> strict validation -> whole-plan rules. Problems are collected on the way and raised together,
each once and with the line of the file that the author wrote.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engine.errors import PlanError
from engine.plan.batches import work_out_batches
from engine.plan.epochs import hold_places, work_out_steps
from engine.plan.limits import within_limits
from engine.plan.model import carried, merged, resolve_model, resolve_vocabulary
from engine.plan.overrides import apply_overrides, expand_shorthands
from engine.plan.paths import expand_paths
from engine.plan.places import read_plan_text, written_at
from engine.plan.plan import SHARED_SECTIONS, EvaluationPlan, Plan, StagePlan
from engine.plan.problems import translate, value_at
from engine.plan.rules import RULES, Draft, tasks_are_told_apart
from engine.plan.schema import annotation_at, field_types, range_of
from engine.plan.upgrades import upgrade_routers
from engine.plan.yaml import Document, Path, Problem, read_yaml, show_value
from omnivl.tasks import TaskConfig

Key = TypeVar("Key", str, int)
Config = TypeVar("Config")


def plan_file(path: FilePath | str) -> FilePath:
    """The file of a plan: the path itself, or of a run's folder the plan in it, which holds the run's overrides."""
    try:
        return FilePath(path) / "plan.yaml" if FilePath(path).is_dir() else FilePath(path)
    except OSError:  # a name that no file can have, of which reading says so
        return FilePath(path)


def load_plan(path: FilePath | str, overrides: Sequence[str] = (), world_size: int | None = None) -> Plan:
    """Reads a plan from a file, or from the folder of a run; see ``parse_plan`` and ``plan_file``.

    Raises:
        PlanError: The file cannot be read, or something in it or in the overrides is wrong.
    """
    path = plan_file(path)
    return parse_plan(read_plan_text(path), str(path), overrides, world_size)


def parse_plan(text: str, place: str = "<plan>", overrides: Sequence[str] = (), world_size: int | None = None) -> Plan:
    """Turns YAML text into a plan.

    Args:
        text: The YAML.
        place: File name for messages.
        overrides: ``path=value`` each, e.g. ``stages.joint.optimizer.lr=2e-4``; a member of a list is named by its
            index, ``name`` or ``kind``.
        world_size: Number of processes of the run, where it is known.

    Raises:
        PlanError: Names every problem of the text and the overrides.
    """
    document = read_yaml(text, place)
    if document.problems and document.tree is None:
        raise PlanError(_report(document, document.problems))
    if not isinstance(document.tree, dict):
        got = "nothing" if document.tree is None else show_value(document.tree)
        problem = Problem((), got, "a mapping with the keys " + ", ".join(field_types(Plan)), "write a plan")
        raise PlanError(_report(document, [problem]))
    expand_shorthands(document.tree)
    problems = [*document.problems, *apply_overrides(document, overrides)]
    expand_paths(document.tree)
    problems += resolve_model(document)
    problems += resolve_vocabulary(document)
    tree = _with_shared_sections(document.tree)
    problems += upgrade_routers(tree, document.places)
    work_out_batches(tree, world_size)
    problems += hold_places(tree)
    tree, beyond = within_limits(Plan, tree)
    plan, draft, found = _validate(tree, world_size)
    problems += found
    problems += [problem for rule in RULES for problem in rule(draft)]
    problems += beyond
    if problems:
        raise PlanError(_report(document, problems))
    assert plan is not None, "validation failed without a problem"
    plan, problems = work_out_steps(plan, world_size)
    if problems:
        raise PlanError(_report(document, problems))
    return plan


def parse_tasks(document: Document, overrides: Sequence[str] = ()) -> tuple[TaskConfig, ...]:
    """Types evaluation tasks that stand outside of a plan.

    Args:
        document: A mapping ``tasks: [...]``, as a stage's ``evaluate`` section has it; changed in place.
        overrides: ``tasks.NAME.option=value``; a task is named by its index, name or kind.

    Raises:
        PlanError: Names every problem of the document and the overrides.
    """
    if not isinstance(document.tree, dict):
        got = "nothing" if document.tree is None else show_value(document.tree)
        problem = Problem((), got, "a mapping with the key tasks", "write tasks: [...]")
        raise PlanError(_report(document, [*document.problems, problem]))
    holder = {"stages": [{"evaluate": document.tree}]}
    expand_shorthands(holder)
    problems = [*document.problems, *apply_overrides(document, overrides)]
    expand_shorthands(holder)
    tasks: tuple[TaskConfig, ...] = ()
    tree, beyond = within_limits(EvaluationPlan, document.tree)
    try:
        tasks = _read(EvaluationPlan, tree).tasks
    except ValidationError as error:
        problems += translate(error, EvaluationPlan, tree)
    problems += beyond
    problems += tasks_are_told_apart(tasks, ("tasks",))
    if problems:
        raise PlanError(_report(document, problems))
    return tasks


def parse_as(cls: type[Config], document: Document) -> Config:
    """Types a YAML file that is no plan, as strictly as one.

    Args:
        cls: A dataclass that says what may stand there.
        document: The file.

    Raises:
        PlanError: Names every problem of the document.
    """
    tree = {} if document.tree is None else document.tree
    if not isinstance(tree, dict):
        allowed = "a mapping with the keys " + ", ".join(field_types(cls))
        raise PlanError(_report(document, [*document.problems, Problem((), show_value(tree), allowed, "write one")]))
    problems = list(document.problems)
    tree, beyond = within_limits(cls, tree)
    try:
        typed: Config = _read(cls, tree)
    except ValidationError as error:
        problems += translate(error, cls, tree)
    problems += beyond
    if problems:
        raise PlanError(_report(document, problems))
    return typed


def load_section(path: FilePath, cls: type[Config]) -> Config:
    """Reads a YAML file that holds the fields of one dataclass.

    Raises:
        PlanError: The file cannot be read, or names every problem in it.
    """
    return parse_as(cls, read_yaml(read_plan_text(path), str(path)))


def _with_shared_sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which every stage has the plan's shared sections, overridden by its own fields."""
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return dict(tree)
    complete = []
    for stage in stages:
        if isinstance(stage, dict):
            shared = {name: tree[name] for name in SHARED_SECTIONS if isinstance(tree.get(name), dict)}
            own = {name: _over(name, shared[name], stage[name]) if name in stage else shared[name] for name in shared}
            stage = {**stage, **own}
        complete.append(stage)
    return {**tree, "stages": complete}


def _over(section: str, shared: dict[str, Any], own: Any) -> Any:
    """The plan's section overridden by a stage's fields; of a model of another architecture only the fields of both."""
    if section == "model" and isinstance(own, dict) and own.get("kind", shared.get("kind")) != shared.get("kind"):
        return merged(carried(shared, own), own)
    return merged(shared, own)


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    # Wrapped in a tuple: pydantic applies the settings to a plain dataclass only as a part of another type.
    return TypeAdapter(tuple[cls], config=ConfigDict(strict=True, extra="forbid"))


def _read(cls: Any, tree: Any) -> Any:
    # Through JSON, whose strict mode accepts lists as tuples and 1 as 1.0, but neither true nor "1" as 1.
    return _adapter(cls).validate_json(json.dumps([tree]))[0]


def _validate(tree: dict[str, Any], world_size: int | None) -> tuple[Plan | None, Draft, list[Problem]]:
    """Types the tree. If parts of it are wrong, the others are still typed, so that rules can check them."""
    stages = tree.get("stages")
    stages = stages if isinstance(stages, list) else []
    names = tuple(stage.get("name") if isinstance(stage, dict) else None for stage in stages)
    parents = tuple(stage.get("init_from") if isinstance(stage, dict) else None for stage in stages)
    try:
        plan: Plan = _read(Plan, tree)
    except ValidationError as error:
        problems = translate(error, Plan, tree)
    else:
        sections = {name: getattr(plan, name) for name in field_types(Plan) if name != "stages"}
        return plan, Draft(sections, dict(enumerate(plan.stages)), names, parents, world_size), []
    sections = {}
    for name, annotation in field_types(Plan).items():
        if name in tree and name != "stages":
            sections.update(_readable({name: annotation}, {name: tree[name]}))
    pruned = _without([problem.path for problem in problems], tree).get("stages")
    stages = pruned if isinstance(pruned, list) else []
    typed = _readable(dict.fromkeys(range(len(stages)), StagePlan), dict(enumerate(stages)))
    return None, Draft(sections, typed, names, parents, world_size), problems


def _without(paths: Iterable[Path], tree: Any) -> Any:
    """A copy without the wrong fields, so that the others can be checked; list members stay.

    A number out of its range is replaced by the nearest allowed one, since a field without a default may not be
    missing.
    """
    whole = copy.deepcopy(tree)
    for path in filter(None, paths):
        holder = value_at(whole, path[:-1])  # absent if a problem of another alternative has removed all of it
        bounds, value = range_of(annotation_at(Plan, tree, path)), value_at(tree, path)
        nearest = bounds.nearest(value) if bounds is not None and isinstance(value, int | float) else None
        if nearest is not None and holder is not None:
            holder[path[-1]] = nearest
        elif isinstance(holder, dict):
            holder.pop(path[-1], None)
    return whole


def _readable(annotations: Mapping[Key, Any], trees: Mapping[Key, Any]) -> dict[Key, Any]:
    """The typed members of ``trees``; problems of the others have been reported already."""
    typed = {}
    for key, annotation in annotations.items():
        try:
            typed[key] = _read(annotation, trees[key])
        except ValidationError:
            continue
    return typed


def _report(document: Document, problems: Iterable[Problem]) -> list[str]:
    """One line per problem, in the order of the file, each path once."""
    lines: dict[Path, str] = {}
    for problem in problems:
        path = written_at(document, problem.path)
        moved = Problem(path, problem.got, problem.allowed, problem.change)
        lines.setdefault(path, f"{document.place(path)}: {moved.text}")
    return [lines[path] for path in sorted(lines, key=lambda path: _line(document.place(path)))]


def _line(place: str) -> tuple[bool, int]:
    """Sorts places in the file by line, and overrides behind them."""
    number = place.rpartition(":")[2]
    return (False, int(number)) if number.isdigit() else (True, 0)
