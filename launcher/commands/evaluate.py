"""``omnivl evaluate``: scores of a trained stage, on one process or on several that share the samples."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.disk.trained import Trained, find_trained, load_encoder
from engine.finished.evaluate import as_override, choose_tasks, evaluate, keep_evaluation
from engine.plan.consent import require_consent
from engine.plan.schema import kinds
from engine.processes import ranks
from engine.processes.process_group import join_process_group
from engine.report import score_table
from engine.telemetry.console import PlainConsole, plain_text
from launcher.commands.consent import AllowCommands
from launcher.commands.outputs import require_writable
from launcher.start.discovery import join_launch
from launcher.start.local import run_local
from launcher.start.worker import end_process
from omnivl.tasks import TaskConfig


@dataclass(frozen=True)
class Request:
    """The command line, in a form that can be sent to other processes."""

    target: str
    stage: str | None
    plan: str | None
    tasks: tuple[str, ...]
    config: str | None
    overrides: tuple[str, ...]
    batch_size: int
    out: str | None
    as_json: bool
    allow_commands: bool


def command(
    target: Annotated[Path, typer.Argument(help="A run folder, or a .safetensors file.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help=f"Names or kinds: {','.join(kinds(TaskConfig))}. All by default.", metavar="A,B"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with tasks: [...]; the plan's by default.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="TASK.option=value, e.g. retrieval.rerank=16; may be repeated.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass and process.")] = 64,
    processes: Annotated[
        int | None, typer.Option(min=1, help="One per GPU by default, or one.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="evaluation-STAGE.json in the run folder by default.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Scores a trained stage by its plan's tasks or by others, beside chance and a baseline of pixels.

    Examples:
      omnivl evaluate runs/quickstart
      omnivl evaluate runs/quickstart --processes 2 --json
      omnivl evaluate runs/quickstart --stage spatial --out scores.json
    """
    if out is not None:
        require_writable(out)
    request = Request(
        target=str(target),
        stage=stage,
        plan=None if plan is None else str(plan),
        tasks=tuple(tasks or ()),
        config=None if config is None else str(config),
        overrides=tuple(overrides or ()),
        batch_size=batch_size,
        out=None if out is None else str(out),
        as_json=as_json,
        allow_commands=allow_commands,
    )
    if join_launch():  # started by torchrun, srun, mpirun ...: this is one process of several
        main([json.dumps(asdict(request))])
    wanted = processes or max(1, torch.cuda.device_count())
    if wanted == 1:
        run_request(request)
        return
    _choose(request, lambda text: None)  # reports mistakes once, before processes are started
    code = run_local("launcher.commands.evaluate", [json.dumps(asdict(request))], wanted)
    if code:
        raise typer.Exit(code)


def run_request(request: Request) -> int:
    """Evaluates and prints. Called by every process; the first one prints and writes."""
    told = PlainConsole(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    trained, tasks = _choose(request, told.print)
    device = join_process_group(trained.plan.launch.timeout_seconds)
    first = ranks.rank() == 0
    with told.status(f"loading {trained.weights}") as status:
        encoder = load_encoder(trained, device, request.batch_size)
        evaluation = evaluate(trained, tasks, encoder, lambda task: status.update(plain_text(f"evaluating {task}")))
    path = keep_evaluation(evaluation, None if request.out is None else Path(request.out))
    if not first:
        return 0
    if request.as_json:
        print(json.dumps(evaluation.as_json(galleries=False), indent=2))
        return 0
    console = PlainConsole()
    scores = [score for result in evaluation.results for score in result.scores]
    console.print(score_table(scores, f"{trained.plan.name}, stage {trained.stage.name}"))
    if path is not None:
        console.print(f"written: {path}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """One process of several: ``python -m launcher.commands.evaluate REQUEST``, the request as JSON."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    fields = json.loads(text)
    fields |= {"tasks": tuple(fields["tasks"]), "overrides": tuple(fields["overrides"])}
    end_process(lambda: run_request(Request(**fields)))


def _choose(request: Request, tell: Callable[[str], None]) -> tuple[Trained, tuple[TaskConfig, ...]]:
    plan = None if request.plan is None else Path(request.plan)
    trained = find_trained(Path(request.target), request.stage, plan)
    config = None if request.config is None else Path(request.config)
    tasks = choose_tasks(trained, request.tasks, config, request.overrides, tell)
    run = None if trained.run is None else trained.run.plan
    files = [file for file in (run, plan, config) if file is not None]
    require_consent(tasks, files, [*map(as_override, request.overrides)], allowed=request.allow_commands)
    return trained, tasks


if __name__ == "__main__":
    main()
