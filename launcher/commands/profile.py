"""``omnivl profile``: seconds and memory of each layer, by which a pipeline may be cut."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from engine.disk.run_folder import write_whole
from engine.estimate.layers import activation_bytes, blank_states, layer_seconds
from engine.estimate.trained import mark_trained
from engine.estimate.vocabulary import tokenizer_or_size
from engine.hosts.pipeline.profile import LayerUse, profile_json
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from engine.plan.precision import compute_dtype
from engine.processes.process_group import choose_device
from engine.step.freeze import store_frozen
from engine.telemetry.console import PlainConsole, PlainTable, say
from engine.telemetry.environment import describe_environment
from launcher.commands.outputs import require_writable
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import pass_label
from omnivl.data.tokenizer import Tokenizer
from omnivl.objectives.teacher import stand_in_teachers


def profile(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file, or a run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value, e.g. batch.micro_batch_size_per_gpu=8", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for parallel.pipeline_profile.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each layer; the best counts.")] = 3,
) -> None:
    """Runs each layer of every stage's model forward and backward on blank samples, on one device of this machine.

    Only what a stage trains has gradients of its own, and nothing before the first of it is run backward.

    Examples:
      omnivl profile configs/plans/quickstart.yaml
      omnivl profile configs/plans/quickstart.yaml --out layers.json
    """
    if out is not None:
        require_writable(out)
    read = load_plan(plan, overrides or ())
    tokenizer, device = tokenizer_or_size(read), choose_device()
    measured = {stage.name: _measure(stage, tokenizer, device, repeats) for stage in read.stages}
    console = PlainConsole()
    for name, uses in measured.items():
        console.print(_table(name, uses))
    if out is not None:
        write_whole(out, profile_json(measured, describe_environment(1)))
        say(out)


def _measure(
    stage: StagePlan, tokenizer: Tokenizer, device: torch.device, repeats: int
) -> dict[tuple[str, int], LayerUse]:
    dtype = compute_dtype(stage.parallel, device)
    meta = torch.device("meta")
    with meta:
        shapes = build_chain(stage.model, stage.objectives, tokenizer.special, compute_dtype=dtype)
    chain = build_chain(stage.model, stage.objectives, tokenizer.special, compute_dtype=dtype).to(device)
    for one in (shapes, chain):
        mark_trained(one, stage)
        store_frozen(one, stage.model.stacks)
        stand_in_teachers(one)
    kept = activation_bytes(shapes, blank_states(stage, tokenizer, meta))
    seconds = layer_seconds(chain, blank_states(stage, tokenizer, device), repeats)
    return {one: LayerUse(seconds[one], kept[one]) for one in seconds}


def _table(stage: str, uses: dict[tuple[str, int], LayerUse]) -> PlainTable:
    table = PlainTable("layer", "ms", "share", "activations, MiB", title=f"Stage {stage}, one micro-batch")
    whole = sum(use.seconds for use in uses.values())
    for one, use in uses.items():
        share = f"{use.seconds / whole:.1%}"
        table.add_row(pass_label(*one), f"{use.seconds * 1e3:.2f}", share, f"{use.activation_bytes / 2**20:.1f}")
    kept = sum(use.activation_bytes for use in uses.values())
    table.add_row("all", f"{whole * 1e3:.2f}", "", f"{kept / 2**20:.1f}", style="bold")
    return table
