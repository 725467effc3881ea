"""Evaluation outside of a run: finds the weights of a stage, builds its chain, runs tasks, keeps the result.

A run's weights lie whole in ``weights.safetensors``, so every process builds the whole chain in bare PyTorch: neither
the host nor the number of processes of the training run matters here.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine import ranks
from engine.collectives import make_gather
from engine.errors import CheckpointError
from engine.hosts.weights import match_weights
from engine.plan import Plan, StagePlan
from engine.plan_parse import load_plan, parse_tasks
from engine.plan_problems import closest
from engine.plan_schema import kinds
from engine.plan_yaml import Document, read_yaml
from engine.run_folder import RunFolder, StageFolder, write_whole
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.evaluation.config import TaskConfig
from omnivl.evaluation.encoder import Encoder
from omnivl.evaluation.results import TaskResult
from omnivl.evaluation.run import run_tasks
from omnivl.model.build import build_chain
from omnivl.model.chain import Chain

_NEEDS = {"retrieval": "univlc", "zero_shot": "univlc", "caption": "lm"}
_NO_MESSAGE: Callable[[str], None] = lambda text: None  # noqa: E731 - a default argument that does nothing


@dataclass(frozen=True)
class Trained:
    """A stage whose weights can be loaded.

    Attributes:
        plan: The run's plan.
        stage: The stage.
        weights: Its weights.
        step: Optimizer steps that it took; None where the weights lie outside of a run.
        run: The run's folder; None where the weights lie outside of one.
    """

    plan: Plan
    stage: StagePlan
    weights: Path
    step: int | None = None
    run: RunFolder | None = None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        trained: What was evaluated.
        results: One per task.
    """

    trained: Trained
    results: tuple[TaskResult, ...]

    def as_json(self, *, galleries: bool = True) -> dict[str, Any]:
        """Plain containers, in the form of a stage's ``evaluation.json``.

        Args:
            galleries: Whether to keep the pictures, which are for people.
        """
        results = self.results if galleries else [replace(result, galleries=()) for result in self.results]
        return {
            "plan": self.trained.plan.name,
            "stage": self.trained.stage.name,
            "step": self.trained.step,
            "weights": str(self.trained.weights),
            "results": [result.as_json() for result in results],
        }


def find_trained(target: Path, stage: str | None = None, plan: Path | None = None) -> Trained:
    """Finds weights and the plan that says what they are.

    Args:
        target: A run folder, or a ``.safetensors`` file in one or elsewhere.
        stage: Name of the stage; None takes the newest complete one of a run, the last one of a plan.
        plan: The plan of a file that lies outside of a run.

    Raises:
        UserError: There is no such run, plan or stage, or the stage is not complete.
    """
    if target.is_dir() or (not target.exists() and target.suffix != ".safetensors"):
        return _in_run(RunFolder(target), stage)
    if not target.is_file():
        raise CheckpointError(f"{target}: got a file that is not there; allowed a run folder or a .safetensors file")
    folder = target.resolve().parent
    run = RunFolder(folder.parents[1]) if folder.parent.name == "stages" else None
    if plan is None and run is not None and run.plan.is_file():
        own = _named_stage(read := load_plan(run.plan), stage or folder.name.partition("-")[2], str(run.plan))
        return Trained(read, own, target, StageFolder(folder).completed_steps(), run)
    if plan is None:
        raise UserError(
            f"{target}: got weights outside of a run folder; allowed with the plan that they were trained with; add "
            "--plan PLAN.yaml (and --stage NAME where it is not the plan's last stage)"
        )
    read = load_plan(plan)
    return Trained(read, _named_stage(read, stage or read.stages[-1].name, str(plan)), target)


def load_encoder(trained: Trained, device: torch.device, batch_size: int = 64) -> Encoder:
    """Builds the stage's chain, fills it, and puts it into evaluation mode. Called by every process.

    Args:
        trained: What to load.
        device: Where the chain computes.
        batch_size: Samples per forward pass and process.

    Raises:
        CheckpointError: The weights cannot be read or do not fit the stage's model.
    """
    stage, tokenizer, gather = trained.stage, load_tokenizer(trained.plan.tokenizer), make_gather()
    dtype = torch.bfloat16 if stage.parallel.precision == "bf16" else torch.float32
    chain = build_chain(stage.model, stage.objectives, tokenizer.special, gather=gather, compute_dtype=dtype)
    load_weights(chain, trained.weights)
    return Encoder(chain.to(device).eval(), stage.model, tokenizer, gather, device, batch_size)


def load_weights(chain: Chain, path: Path) -> None:
    """Fills a chain with everything that inference reads; momentum twins and queues may be missing or too many.

    Raises:
        CheckpointError: The file cannot be read, a shape differs, or names are missing or unknown.
    """
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: got a file that is no safetensors file or is cut short ({error})") from error
    own = {name: tensor for name, tensor in chain.state_dict().items() if not _only_trains(name)}
    given = {name: tensor for name, tensor in given.items() if not _only_trains(name)}
    try:
        report = match_weights(_shapes(own), _shapes(given), strict=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if report.missing or report.unexpected:
        raise CheckpointError(
            f"{path}: got weights that do not fit the stage's model and objectives: missing {_listed(report.missing)}; "
            f"unknown {_listed(report.unexpected)}; name the stage that they belong to with --stage"
        )
    for name in report.matched:
        own[name].copy_(given[name])


def choose_tasks(
    trained: Trained, names: Sequence[str] = (), config: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[TaskConfig, ...]:
    """The tasks to run: those of a file, of the stage, or of the last stage that has some.

    Args:
        trained: What is to be evaluated.
        names: Names or kinds of the tasks to keep; a kind that none of them has stands for its defaults. Empty keeps
            all.
        config: A YAML file with ``tasks: [...]`` as in a stage's ``evaluate`` section.
        overrides: ``TASK.option=value``; the task by its name, kind or index.

    Raises:
        UserError: A task is unknown or wrong, there is none, or the stage has not been trained for it.
    """
    document = _document(trained, names) if config is None else _read(config)
    dotted = [text if text.startswith("tasks") else f"tasks.{text}" for text in overrides]
    tasks = parse_tasks(document, dotted)
    if names:
        known = list(dict.fromkeys([*(task.name for task in tasks), *kinds(TaskConfig)]))
        for name in names:
            if not any(name in (task.name, task.kind) for task in tasks):
                change = closest(name, known, "name one of them")
                raise UserError(f"--tasks: got {name!r}; allowed are {', '.join(map(repr, known))}; {change}")
        tasks = tuple(task for task in tasks if task.name in names or task.kind in names)
    if not tasks:
        raise UserError(
            f"{trained.plan.name}: got a plan whose stages have no evaluation tasks; choose some with --tasks "
            f"{','.join(kinds(TaskConfig))}, or give a file with --config TASKS.yaml"
        )
    for task in tasks:
        _check_trained_for(trained.stage, task)
    return tasks


def evaluate(
    trained: Trained, tasks: Sequence[TaskConfig], encoder: Encoder, tell: Callable[[str], None] = _NO_MESSAGE
) -> Evaluation:
    """Runs the tasks. Called by every process; results are equal on all of them.

    Args:
        trained: What is evaluated.
        tasks: In their order.
        encoder: From ``load_encoder``.
        tell: Is told each task's name before it starts.
    """
    results: list[TaskResult] = []
    for task in tasks:
        tell(task.name)
        results += run_tasks([task], encoder)
    return Evaluation(trained, tuple(results))


def write_evaluation(evaluation: Evaluation, path: Path | None = None) -> Path | None:
    """Writes ``evaluation-STAGE.json`` into the run folder, or to ``path``. Called by every process.

    Returns:
        Where it lies; None where there is neither a run nor a path.
    """
    run = evaluation.trained.run
    if path is None and run is not None:
        path = run.path / f"evaluation-{evaluation.trained.stage.name}.json"
    if path is not None and ranks.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(evaluation.as_json(), indent=1))
    return path


def _in_run(run: RunFolder, name: str | None) -> Trained:
    """The stage of that name, or the newest complete one."""
    if not run.plan.is_file():
        siblings = [folder.parent.name for folder in sorted(run.path.absolute().parent.glob("*/plan.yaml"))]
        there = "is not there" if not run.path.exists() else "holds no plan.yaml"
        known = f" (beside it: {', '.join(siblings)})" if siblings else ""
        raise UserError(
            f"{run.path}: got a run folder that {there}; allowed the folder of a run, such as runs/quickstart{known}; "
            f"{closest(run.path.name, siblings, 'name one that omnivl pretrain has written')}"
        )
    plan = load_plan(run.plan)
    folders = {stage.name: run.stage(index, stage.name) for index, stage in enumerate(plan.stages)}
    complete = [stage for stage, folder in folders.items() if folder.completed_steps() is not None]
    if name is None and not complete:
        raise CheckpointError(f"{run.path}: got a run without a complete stage; finish one with omnivl pretrain")
    stage = _named_stage(plan, name or complete[-1], str(run.plan))
    folder = folders[stage.name]
    if stage.name not in complete:
        raise CheckpointError(
            f"{run.path}: got stage {stage.name!r}, which is not complete; allowed are the complete ones "
            f"({', '.join(complete) or 'none yet'}); finish it with omnivl pretrain, or choose another with --stage"
        )
    if not folder.weights.is_file():
        raise CheckpointError(f"{folder.weights}: not found, though stage {stage.name!r} is complete; train it again")
    return Trained(plan, stage, folder.weights, folder.completed_steps(), run)


def _named_stage(plan: Plan, name: str, where: str) -> StagePlan:
    names = [stage.name for stage in plan.stages]
    if name not in names:
        change = closest(name, names, "name one of them")
        raise UserError(f"{where}: got stage {name!r}; allowed are {', '.join(map(repr, names))}; {change}")
    return plan.stage(name)


def _document(trained: Trained, names: Sequence[str]) -> Document:
    """The plan's tasks, and defaults of the kinds that are asked for but that it does not have, as a tree."""
    chosen = trained.stage.evaluate.tasks
    if not chosen:
        chosen = next((stage.evaluate.tasks for stage in reversed(trained.plan.stages) if stage.evaluate.tasks), ())
    tasks: list[Any] = json.loads(json.dumps([asdict(task) for task in chosen]))
    present = {word for task in chosen for word in (task.name, task.kind)}
    tasks += [{"kind": name} for name in names if name in kinds(TaskConfig) and name not in present]
    return Document({"tasks": tasks}, {(): f"evaluation tasks of {trained.plan.name}"})


def _read(config: Path) -> Document:
    try:
        return read_yaml(config.read_text(encoding="utf-8"), str(config))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: got {config}, which cannot be read ({error}); name a YAML file") from error


def _check_trained_for(stage: StagePlan, task: TaskConfig) -> None:
    """Heads belong to objectives: without them a stage has nothing to match or write with."""
    trained = {objective.name for objective in stage.objectives}
    needed = {_NEEDS[task.kind]} if task.kind == "caption" else set()
    needed |= {"vlm"} if getattr(task, "rerank", 0) > 0 else set()
    if needed - trained:
        lacking = ", ".join(sorted(needed - trained))
        change = "set its rerank to 0" if "vlm" in needed - trained else "leave it out with --tasks"
        raise UserError(
            f"task {task.name!r} ({task.kind}): got stage {stage.name!r}, which has no head of {lacking}; allowed are "
            f"stages that train {lacking}; choose another with --stage, or {change}"
        )


def _only_trains(name: str) -> bool:
    return any(part.startswith("momentum_") or part == "queue" for part in name.split("."))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:4]) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")
