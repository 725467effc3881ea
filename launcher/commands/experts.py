"""``omnivl experts``: fewer experts for a trained stage, pruned or merged, with what each step loses."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from engine.disk.trained import find_trained, load_encoder
from engine.finished.evaluate import choose_tasks
from engine.finished.experts import How, Keep, Similarity, Step, check_keeps, reduce_experts, write_run
from engine.plan.consent import require_consent
from engine.processes.process_group import choose_device
from engine.report.table import format_share
from engine.telemetry.console import PlainConsole, PlainTable, plain_text, say
from launcher.commands.consent import AllowCommands
from launcher.commands.embed import parse_media, parse_where
from launcher.commands.outputs import require_writable
from omnivl.errors import UserError
from omnivl.inference.pictures import PictureSet


def experts(
    target: Annotated[
        Path,
        typer.Argument(help="A run's, stage's or checkpoint's folder, or a .safetensors file.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the smaller run; new or empty.", show_default=False)],
    keep: Annotated[
        str, typer.Option(help="Experts of a layer after each step, e.g. 6,4,2,dense.", show_default=False)
    ],
    how: Annotated[How, typer.Option(help="Take the least used experts out, or merge similar ones.")] = "merge",
    similarity: Annotated[
        Similarity, typer.Option(help="By what experts are merged: rows of the router, or outputs for the same tokens.")
    ] = "router",
    data: Annotated[str, typer.Option(help="What experts are counted on: emoji, motion, or shards.")] = "emoji",
    media: Annotated[str, typer.Option(help="image or video.")] = "image",
    where: Annotated[str, typer.Option(help="Filter by metadata, e.g. '{style: [fluent]}'.")] = "{}",
    max_samples: Annotated[int, typer.Option(min=1, help="Upper bound; evenly thinned beyond it.")] = 512,
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names or kinds; the plan's by default.", metavar="A,B", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    allow_commands: AllowCommands = False,
) -> None:
    """Prunes or merges a trained stage's experts step by step, measures each step, writes the last as a run.

    Examples:
      omnivl experts runs/quickstart runs/fewer --keep 6,4,2
      omnivl experts runs/quickstart runs/dense --keep 4,dense --how prune --where '{style: [fluent, noto]}'
    """
    keeps = parse_keep(keep)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: got a place that is taken; allowed is a new or empty folder; name another")
    require_writable(out / "plan.yaml")
    seen, chosen = parse_media(media), parse_where(where)
    trained = find_trained(target, stage, plan)
    check_keeps(trained, keeps)
    picked = choose_tasks(trained, tuple(tasks or ()))
    files = [file for file in (None if trained.run is None else trained.run.plan, plan) if file is not None]
    require_consent(picked, files, [], allowed=allow_commands)
    told = PlainConsole(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    steps: list[Step] = []
    with told.status(f"loading {trained.weights}") as status:
        encoder = load_encoder(trained, choose_device(), batch_size)
        pictures = PictureSet(data, seen, where=chosen, sizes=encoder.model.inputs, max_samples=max_samples)
        made = reduce_experts(
            *(trained, encoder, keeps, how, similarity, pictures, picked), lambda text: status.update(plain_text(text))
        )
        steps.extend(made)
    write_run(steps[-1], out)
    if as_json:
        said = {"plan": trained.plan.name, "stage": trained.stage.name, "step": trained.step, "how": how}
        typer.echo(json.dumps({"folder": str(out), **said, "steps": [one.as_json() for one in steps]}, indent=2))
        return
    PlainConsole().print(_table(steps, f"{trained.plan.name}, stage {trained.stage.name}: {how}"))
    say(f"written: {out}")


def parse_keep(text: str) -> list[Keep]:
    """``6,4,dense`` as what is kept after each step.

    Raises:
        UserError: A part is neither a whole number above 0 nor ``dense``.
    """
    found: list[Keep] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "dense":
            found.append("dense")
        elif part.isascii() and part.isdigit() and 0 < int(part) < 10**6:
            found.append(int(part))
        else:
            raise UserError(
                f"--keep: got {part!r} in {text!r}; allowed are whole numbers above 0 and 'dense', with commas between "
                "them; write 6,4,dense"
            )
    return found


def _table(steps: list[Step], title: str) -> PlainTable:
    """A row for each figure, a column for each step."""
    table = PlainTable("task", "metric", *map(_heading, steps), title=title)
    table.add_row("", "parameters, M", *(f"{one.parameters / 1e6:.2f}" for one in steps))
    found = [{(score.task, score.metric): format_share(score.value) for score in one.scores} for one in steps]
    for task, metric in found[0]:
        table.add_row(task, metric, *(one.get((task, metric), "-") for one in found))
    return table


def _heading(step: Step) -> str:
    if step.keep is None:
        return "as it was"
    return "dense" if step.keep == "dense" else f"{step.keep} expert{'' if step.keep == 1 else 's'}"
