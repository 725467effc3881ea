"""``omnivl predict``: what a trained stage says of each sample, for test sets without answers and for servers."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.disk.run_folder import write_whole
from engine.disk.trained import Trained, find_trained, load_encoder
from engine.finished.evaluate import as_override, choose_tasks
from engine.plan.consent import require_consent
from engine.plan.schema import kinds
from engine.processes.process_group import choose_device
from engine.telemetry.console import say
from launcher.commands.consent import AllowCommands
from launcher.commands.embed import parse_where
from launcher.commands.outputs import require_writable
from omnivl.data.sources.generated import GENERATED
from omnivl.errors import UserError
from omnivl.tasks import TaskConfig
from omnivl.tasks.predicting import PredictingTask
from omnivl.tasks.submissions import FORMATS, choose_format, with_identifiers

_ALL = 2**31
"""More samples than a data set has."""
_LIMIT = re.compile(r"[^=]*\.max_samples=")


def predict(
    target: Annotated[Path, typer.Argument(help="A run folder, or a .safetensors file.", show_default=False)],
    task: Annotated[str, typer.Option(help="Name or kind of one task.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="Shards by a pattern, or a source; the task's by default.", show_default=False)
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Filter, e.g. '{split: [test]}'; with --data none by default.", show_default=False),
    ] = None,
    form: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = "jsonl",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="TASK.option=value, e.g. caption.num_beams=3; may be repeated.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with tasks: [...]; the plan's by default.", show_default=False)
    ] = None,
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 64,
    allow_commands: AllowCommands = False,
) -> None:
    """Writes a trained stage's predictions for all samples of a task, which need no answers: a line of JSON for each.

    Examples:
      omnivl predict runs/quickstart --task caption --where '{style: [twemoji]}' --out captions.jsonl
    """
    require_writable(out)
    trained = find_trained(target, stage, plan)
    chosen = _choose(trained, task, config, overrides or [])
    if data is not None:
        chosen = replace(chosen, source=data, where={})
    if where is not None:
        chosen = replace(chosen, where=parse_where(where))
    if chosen.source not in GENERATED and not any(_LIMIT.match(one) for one in overrides or []):
        chosen = replace(chosen, max_samples=_ALL)
    files = [file for file in (None if trained.run is None else trained.run.plan, plan, config) if file is not None]
    typed = [*map(as_override, overrides or ()), *([] if data is None else [f"tasks.0.source={json.dumps(data)}"])]
    require_consent((chosen,), files, typed, allowed=allow_commands)
    assert isinstance(chosen, PredictingTask), "as _choose says"
    written = choose_format(form, chosen)
    with torch.no_grad():
        encoder = load_encoder(trained, choose_device(), batch_size)
        pictures = chosen.unjudged(encoder)
        known = with_identifiers(form, pictures.samples)  # before the predictions, which take long
        lines = chosen.lines(pictures, encoder)
    write_whole(out, written.write([{**line, **own} for line, own in zip(lines, known, strict=True)]))
    say(f"{out}: {len(lines)} predictions of stage {trained.stage.name}, task {chosen.name}, format {form}")


def _choose(trained: Trained, name: str, config: Path | None, overrides: list[str]) -> TaskConfig:
    """The one task of that name or kind.

    Raises:
        UserError: There is none, there are several, or it predicts nothing without what is right.
    """
    tell = partial(say, err=True)
    found = choose_tasks(trained, (name,), config, overrides, tell, "--task")
    found = tuple(one for one in found if one.name == name) or found
    if len(found) > 1:
        names = ", ".join(repr(one.name) for one in found)
        raise UserError(f"--task: got {name!r}; allowed is one task, and it stands for {names}; name one of them")
    (chosen,) = found
    if not isinstance(chosen, PredictingTask):
        able = [kind for kind, one in kinds(TaskConfig).items() if issubclass(one, PredictingTask)]
        raise UserError(
            f"--task: got {name!r}, which is of kind {chosen.kind!r} and predicts nothing without what is right; "
            f"allowed are tasks of the kinds {', '.join(map(repr, able))}; name one of them"
        )
    return replace(chosen, predictions=True)
