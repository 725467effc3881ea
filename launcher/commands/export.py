"""``omnivl export``: a trained stage as a folder of Hugging Face."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from engine.disk.trained import find_trained
from engine.finished.export import Dtype, Form
from engine.finished.export import export as write_export
from engine.telemetry.console import say
from omnivl.errors import UserError

_SIZE = re.compile(r"[1-9][0-9]{0,8}[KMG]i?B")


def export(
    target: Annotated[
        Path,
        typer.Argument(help="A run's, stage's or checkpoint's folder, or a .safetensors file.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; new or empty.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = "fp32",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 500MB.")] = "5GB",
    form: Annotated[
        Form, typer.Option("--format", help="Whose class: omnivl.hub's, or one of transformers' own.")
    ] = "omnivl",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Writes a trained stage for transformers: safetensors, config, tokenizer, processor, model card.

    Examples:
      omnivl export runs/quickstart hub/quickstart
      omnivl export runs/clip_tiny hub/clip_tiny --format transformers
      omnivl export runs/quickstart hub/described --json
    """
    if _SIZE.fullmatch(max_shard_size) is None:
        raise UserError(
            f"--max-shard-size: got {max_shard_size!r}; allowed a whole number above 0 with KB, MB or GB; write 5GB"
        )
    trained = find_trained(target, stage, plan)
    done = write_export(trained, out, dtype, max_shard_size, form)
    if as_json:
        said = {"plan": trained.plan.name, "stage": trained.stage.name, "step": trained.step}
        made = {"format": form, "dtype": dtype, "parameters": done.parameters, "left_out": list(done.left_out)}
        typer.echo(json.dumps({"folder": str(out), **said, **made, "notes": list(done.notes)}, indent=2))
        return
    say(f"{out}: stage {trained.stage.name} of {trained.plan.name}, {done.parameters:,} parameters in {dtype}")
    if done.left_out:
        heads = sorted({".".join(name.split(".")[1:3]) for name in done.left_out})
        say(f"left out, as they only train: {', '.join(heads)}")
    for note in done.notes:
        say(note)
