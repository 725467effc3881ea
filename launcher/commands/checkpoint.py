"""``omnivl checkpoint``: inspect and verify checkpoints, extract and average their weights."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.disk.saved import Saved, average_weights, describe, find_checkpoint, find_faults, saved_weights
from engine.errors import CheckpointError
from engine.telemetry.console import PlainConsole, PlainTable, say
from launcher.commands.outputs import require_writable
from omnivl.data.inspect_page import readable_bytes
from omnivl.errors import UserError, reason_of

app = typer.Typer(help="Inspect, verify, convert and average checkpoints.", no_args_is_help=True, rich_markup_mode=None)

Target = Annotated[Path, typer.Argument(help="A step-... folder, a stage's or a run's folder.", show_default=False)]
Out = Annotated[Path, typer.Option(help="The .safetensors file to write.", show_default=False)]
Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@app.command("inspect")
def inspect_command(
    target: Target, as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False
) -> None:
    """Shows step, layout, sizes and parts of the newest whole checkpoint.

    Examples:
      omnivl checkpoint inspect runs/quickstart
      omnivl checkpoint inspect runs/quickstart --json
    """
    saved = describe(find_checkpoint(target))
    if as_json:
        typer.echo(json.dumps(saved.as_json(), indent=1))
    else:
        _show(saved)


@app.command("verify")
def verify_command(
    target: Target, as_json: Annotated[bool, typer.Option("--json", help="Print faults as JSON.")] = False
) -> None:
    """Compares every checkpoint and stage's weights below a path with their SHA-256; exit code 1 where one differs.

    Examples:
      omnivl checkpoint verify runs/quickstart
    """
    faults = {str(path): fault for path, fault in find_faults(target).items()}
    if as_json:
        typer.echo(json.dumps(faults, indent=1))
    else:
        for checkpoint, fault in faults.items():
            say(f"{checkpoint}: {'whole' if fault is None else fault}")
    if any(fault is not None for fault in faults.values()):
        raise typer.Exit(1)


@app.command("convert")
def convert_command(
    target: Target, out: Out, dtype: Annotated[Dtype, typer.Option(help="Of floating-point weights.")] = "fp32"
) -> None:
    """Takes the weights out of a checkpoint, for omnivl evaluate, embed and routing with --plan.

    Examples:
      omnivl checkpoint convert runs/quickstart --out weights.safetensors --dtype bf16
    """
    _require_place(out)
    source = find_checkpoint(target)
    _write(dict(saved_weights(source)), out, dtype)
    say(f"{source} -> {out}")


@app.command("average")
def average_command(
    targets: Annotated[list[Path], typer.Argument(help="Checkpoints or .safetensors files.", show_default=False)],
    out: Out,
    dtype: Annotated[Dtype, typer.Option(help="Of floating-point weights.")] = "fp32",
) -> None:
    """Averages the weights of checkpoints of one model.

    Examples:
      omnivl checkpoint average RUN/checkpoints/step-100 RUN/checkpoints/step-200 --out averaged.safetensors
    """
    if len(targets) < 2:
        raise UserError("checkpoint average: got one checkpoint; allowed are two or more; name another one")
    _require_place(out)
    sources = [target if target.is_file() else find_checkpoint(target) for target in targets]
    _write(average_weights(sources), out, dtype)
    say(f"{', '.join(map(str, sources))} -> {out}")


def _require_place(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"--out: got {out}; allowed a name that ends in .safetensors; add the ending")
    require_writable(out)


def _write(weights: dict[str, Tensor], out: Path, dtype: Dtype) -> None:
    cast = {name: one.to(_DTYPES[dtype]) if one.is_floating_point() else one for name, one in weights.items()}
    beside = out.with_name(out.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in cast.items()}, beside)
        beside.rename(out)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"{out}: could not be written ({reason_of(error)}); choose another place with --out"
        ) from error


def _show(saved: Saved) -> None:
    console = PlainConsole()
    console.print(f"{saved.path}, {readable_bytes(saved.bytes)}", soft_wrap=True)
    skipped = f", {saved.skipped} skipped" if saved.skipped else ""
    console.print(f"step {saved.step}{skipped}, optimizer step {saved.optimizer_steps}; written by {saved.layout}")
    table = PlainTable("part", "weights", "twins", "moments", title="Elements")
    for part, counts in saved.parts.items():
        table.add_row(part, *(f"{counts[what]:,}" if counts[what] else "-" for what in ("weights", "twins", "moments")))
    console.print(table)
