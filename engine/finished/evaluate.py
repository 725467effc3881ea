"""Evaluation outside of a run: chooses tasks, runs them on a finished stage, keeps the result."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.disk.evaluation import write_evaluation
from engine.disk.trained import Trained
from engine.plan.evaluation import possible_kinds, provided_in
from engine.plan.parse import parse_tasks
from engine.plan.schema import kinds
from engine.plan.yaml import Document, read_yaml
from engine.processes import ranks
from omnivl.data.plain_files import read_small
from omnivl.errors import UserError, did_you_mean, reason_of
from omnivl.inference.encoder import Encoder
from omnivl.tasks import TaskConfig
from omnivl.tasks.results import TaskResult
from omnivl.tasks.run import run_tasks


def _ignore(text: str) -> None:
    """Takes messages and does nothing."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        trained: What was evaluated.
        results: One per task.
    """

    trained: Trained
    results: tuple[TaskResult, ...]

    def as_json(self, *, galleries: bool = True) -> dict[str, Any]:
        """Plain containers, in the form of a stage's ``evaluation.json``.

        Args:
            galleries: Whether to keep the pictures, which only people look at.
        """
        results = self.results if galleries else [replace(result, galleries=()) for result in self.results]
        return {**self.facts, "results": [result.as_json() for result in results]}

    @property
    def facts(self) -> dict[str, Any]:
        """What was evaluated, as plain containers."""
        return {
            "plan": self.trained.plan.name,
            "stage": self.trained.stage.name,
            "step": self.trained.step,
            "weights": str(self.trained.weights),
        }


def choose_tasks(
    trained: Trained,
    names: Sequence[str] = (),
    config: Path | None = None,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = _ignore,
    said: str = "--tasks",
) -> tuple[TaskConfig, ...]:
    """The tasks to run: those of a file, of the stage, or the feasible ones of the last stage that has tasks.

    Args:
        trained: What is to be evaluated.
        names: Names or kinds of the tasks to keep, several with commas between them; a kind that none of them has
            stands for its defaults. Empty keeps all.
        config: A YAML file with ``tasks: [...]`` as in a stage's ``evaluate`` section.
        overrides: ``TASK.option=value``; the task by its name, kind or index.
        tell: Called with a message about what was left out of another stage's tasks.
        said: The option by which the user names tasks.

    Raises:
        UserError: A task is unknown or wrong, there is none, or the stage has not been trained for it.
    """
    base = _tasks_of(trained, tell) if config is None else parse_tasks(_read(config))
    names = _split(names, base)
    present = {word for task in base for word in (task.name, task.kind)}
    tree = [*json.loads(json.dumps([asdict(task) for task in base]))]
    tree += [{"kind": name} for name in names if name in kinds(TaskConfig) and name not in present]
    document = Document({"tasks": tree}, {(): str(config or f"evaluation tasks of {trained.plan.name}")})
    dotted = [as_override(text) for text in overrides]
    tasks = parse_tasks(document, dotted)
    if names:
        known = list(dict.fromkeys([*(task.name for task in tasks), *kinds(TaskConfig)]))
        for name in names:
            if not any(name in (task.name, task.kind) for task in tasks):
                change = did_you_mean(name, known, "name one of them")
                raise UserError(f"{said}: got {name!r}; allowed are {', '.join(map(repr, known))}; {change}")
        tasks = tuple(task for task in tasks if task.name in names or task.kind in names)
    if not tasks:
        possible = possible_kinds(provided_in(trained.plan, trained.stage))
        choose = f"choose some with {said} {','.join(possible)}, or " if possible else ""
        raise UserError(
            f"{trained.plan.name}: got no evaluation tasks, neither of stage {trained.stage.name!r} nor of a later one "
            f"that it could do; {choose}give a file with --config"
        )
    for task in tasks:
        _require(trained, task, said)
    return tasks


def as_override(text: str) -> str:
    """``TASK.option=value`` with its place in a file of tasks."""
    return text if text.startswith("tasks.") else f"tasks.{text}"


def evaluate(
    trained: Trained, tasks: Sequence[TaskConfig], encoder: Encoder, tell: Callable[[str], None] = _ignore
) -> Evaluation:
    """Runs the tasks. Called by every process; results are equal on all of them.

    Args:
        trained: What is evaluated.
        tasks: In their order.
        encoder: From ``load_encoder``.
        tell: Called with each task's name before it starts.
    """
    results: list[TaskResult] = []
    for task in tasks:
        tell(task.name)
        results += run_tasks([task], encoder)
    return Evaluation(trained, tuple(results))


def keep_evaluation(evaluation: Evaluation, path: Path | None = None) -> Path | None:
    """Writes ``evaluation-STAGE.json`` into the run folder, or to ``path``. Called by every process.

    Files of tasks are written beside it: ``evaluation-STAGE-routing.html``.

    Returns:
        The path of the file; None where there is neither a run nor a path.
    """
    run = evaluation.trained.run
    if path is None and run is not None:
        path = run.path / f"evaluation-{evaluation.trained.stage.name}.json"
    if path is not None and ranks.rank() == 0:
        write_evaluation(path, evaluation.facts, evaluation.results, prefix=f"{path.stem}-")
    return path


def _tasks_of(trained: Trained, tell: Callable[[str], None]) -> tuple[TaskConfig, ...]:
    """The stage's own tasks; else those of the last stage that has some, if this stage has their needs."""
    stage = trained.stage
    if stage.evaluate.tasks:
        return stage.evaluate.tasks
    others = [one for one in trained.plan.stages if one.evaluate.tasks]
    provided = provided_in(trained.plan, stage)
    tasks: list[TaskConfig] = []
    for task in others[-1].evaluate.tasks if others else ():
        lacks = task.lacks(provided)
        if absent := [lack for lack in lacks if lack.option is None]:
            tell(f"{task.name}: left out, as stage {stage.name} {absent[0].what}")
            continue
        for lack in lacks:
            tell(f"{task.name}: {lack.option} set to {lack.without}, as stage {stage.name} {lack.what}")
        tasks.append(replace(task, **{lack.option: lack.without for lack in lacks if lack.option is not None}))
    return tuple(tasks)


def _require(trained: Trained, task: TaskConfig, said: str) -> None:
    """Checks that the stage has what a task needs.

    Raises:
        UserError: It lacks something that the task needs.
    """
    for lack in task.lacks(provided_in(trained.plan, trained.stage)):
        able = [one.name for one in trained.plan.stages if not task.lacks(provided_in(trained.plan, one))]
        allowed = f"stages {', '.join(map(repr, able))}" if able else "no stages of this plan"
        others = "leave it out with --tasks" if said == "--tasks" else f"name another one with {said}"
        change = others if lack.option is None else f"set its {lack.option} to {lack.without}"
        choose = "choose another with --stage" if able else f"train one ({lack.remedy})"
        raise UserError(
            f"task {task.name!r} ({task.kind}): got stage {trained.stage.name!r}, which {lack.what}; allowed are "
            f"{allowed}; {choose}, or {change}"
        )


def _split(names: Sequence[str], tasks: Sequence[TaskConfig]) -> list[str]:
    """Names split at commas, except at those within the name of a task."""
    whole = {task.name for task in tasks}
    parts = [part for name in names for part in ([name] if name in whole else name.split(","))]
    return [part.strip() for part in parts if part.strip()]


def _read(config: Path) -> Document:
    try:
        return read_yaml(read_small(config).decode("utf-8"), str(config))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config: got {config}, which cannot be read ({reason_of(error)}); name a YAML file"
        ) from error
