"""``omnivl check``: what a plan would do, or everything that is wrong in it. Needs no GPU and starts no process."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from engine.errors import PlanError
from engine.estimate.layers import activation_bytes, blank_states
from engine.estimate.trained import mark_trained
from engine.estimate.vocabulary import tokenizer_or_size
from engine.hosts.pipeline.cut import divide_stage, stage_costs
from engine.hosts.pipeline.division import trained_elements
from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.consent import reaches, require_consent
from engine.plan.epochs import epoch_of
from engine.plan.parse import load_plan, plan_file
from engine.plan.plan import Plan, StagePlan
from engine.plan.rewrite import earlier_fields
from engine.plan.warnings import stage_warnings
from engine.run.preflight import Look
from engine.step.freeze import store_frozen
from engine.step.optimizer import muon_parameters
from launcher.commands.check_tables import print_summary
from launcher.commands.consent import AllowCommands
from launcher.commands.look import Offline, look_from_here, told
from moe.ranges import AUTO
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import pass_label
from omnivl.chain.names import only_trains, stack_of
from omnivl.data.config import LoaderConfig
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import Tokenizer
from omnivl.errors import UserError
from omnivl.objectives.teacher import stand_in_teachers


def check(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file, or a run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value, e.g. stages.joint.optimizer.lr=2e-4", show_default=False)
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of processes of the run, where the plan leaves it open.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    allow_commands: AllowCommands = False,
    offline: Offline = False,
    run_folder: Annotated[
        Path | None, typer.Option(help="Look as well whether the run can begin, or go on, in this folder.")
    ] = None,
) -> None:
    """Reads a plan and prints what it would do, or everything that is wrong in it. Exit status 0 or 2.

    Looks at every stage's data, evaluation data, weights and tokenizers as far as they can be seen from here.

    Examples:
      omnivl check configs/plans/quickstart.yaml
      omnivl check configs/plans/quickstart.yaml stages.joint.optimizer.lr=2e-4
      omnivl check runs/quickstart
      omnivl check configs/plans/beit3_base.yaml --world-size 64 --offline --json
    """
    try:
        read = load_plan(plan, overrides or (), world_size)
        require_consent(read, [plan_file(plan)], overrides or (), allowed=allow_commands)
        look = Look() if offline else look_from_here(read, plan, _processes(read, world_size), run_folder=run_folder)
        summary: dict[str, Any] = {}
        with look.at(None):
            summary = summarize(read, world_size) | {"earlier_fields": _earlier_fields(plan)}
        summary |= {"offline": offline, "notes": told(look, plan, overrides or ())}
    except UserError as error:
        if not as_json:
            raise
        problems = list(getattr(error, "problems", [str(error)]))
        typer.echo(json.dumps({"ok": False, "problems": problems}, indent=2))
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps({"ok": True, **summary}, indent=2))
    else:
        print_summary(read, summary)
        for line in summary["reaches"]:
            typer.echo(f"\n{line}")


def summarize(plan: Plan, world_size: int | None = None) -> dict[str, Any]:
    """The figures of a plan, as JSON would have them.

    Args:
        plan: A plan without mistakes, read for this number of processes: reading it works its batches out.
        world_size: Number of processes; None takes the plan's, and 1 where that is ``auto``.

    Raises:
        UserError: The tokenizer cannot be loaded, or has more words than the model has rows.
    """
    launched, replicas = plan.launch.processes, _processes(plan, world_size)
    known = world_size is not None or launched != "auto"
    for stage in plan.stages if known else ():
        wanted, found = stage.batch.global_batch_size, stage.samples_per_step(replicas)
        assert wanted in (None, found), f"read for other than {replicas} processes: {found} samples a step for {wanted}"
    tokenizer = tokenizer_or_size(plan)
    return {
        "name": plan.name,
        "seed": plan.seed,
        "world_size": replicas,
        "world_size_known": known,
        "stages": [_stage_summary(stage, plan.loader, tokenizer, replicas) for stage in plan.stages],
        "reaches": [str(one) for one in reaches(plan)],
    }


def _processes(plan: Plan, world_size: int | None) -> int:
    """Number of processes: as told, else the plan's, and 1 where that is ``auto``."""
    launched = plan.launch.processes
    return world_size or (1 if launched == "auto" else launched)


def _earlier_fields(plan: Path) -> dict[str, tuple[str, ...]]:
    """Lines of earlier spelling by file; none where the plan is right with its overrides alone."""
    try:
        load_plan(plan)
    except PlanError:
        return {}
    file = plan_file(plan)
    return earlier_fields(file.read_text(encoding="utf-8"), str(file))


def _stage_summary(stage: StagePlan, loader: LoaderConfig, tokenizer: Tokenizer, world_size: int) -> dict[str, Any]:
    total = sum(entry.weight for entry in stage.data)
    return {
        "name": stage.name,
        "init_from": stage.init_from,
        "steps": stage.steps,
        "epochs": stage.epochs,
        "epoch": None if stage.epochs is None else asdict(epoch_of(stage, loader)),
        "warnings": list(stage_warnings(stage)),
        "mixture": {entry.key: entry.weight / total for entry in stage.data},
        "objectives": {objective.key: objective.weight for objective in stage.objectives},
        "compared_within_a_micro_batch": stage.compared_within_a_micro_batch,
        "comparable_across_micro_batches": _comparable(stage),
        "host": _host(stage),
        "precision": stage.parallel.precision,
        "micro_batch_size_per_gpu": stage.batch.micro_batch_size_per_gpu,
        "gradient_accumulation_steps": stage.batch.gradient_accumulation_steps,
        "replicas": stage.parallel.replicas(world_size),
        "samples_per_step": stage.samples_per_step(world_size),
        "samples": stage.samples_per_step(world_size) * stage.steps,
        "parameters": count_parameters(stage, tokenizer.special),
        "lora": None if stage.lora is None else asdict(stage.lora),
        "pipeline": _pipeline(stage, tokenizer),
        "memory": _memory(stage, tokenizer.special, world_size),
        "lr": stage.optimizer.lr,
        "tasks": [task.name for task in stage.evaluate.tasks],
        "curve": [task.name for task in stage.evaluate.curve.tasks],
        "curve_seconds": stage.evaluate.curve.every_seconds,
    }


def _comparable(stage: StagePlan) -> list[str]:
    """Keys of ``compared_within_a_micro_batch`` that ``batch.contrast: global`` would take from it."""
    within = stage.compared_within_a_micro_batch
    return [one.key for one in stage.objectives if one.compares_embeddings and one.key in within]


def _pipeline(stage: StagePlan, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Passes, operations and memory of each pipeline stage; None for other hosts.

    A stage holds the activations of as many micro-batches as there are stages from it to the last. If several stages
    have a layer, one has its optimizer states; the others' parameters of it are counted as ``copies``.
    """
    if stage.parallel.host != "pipeline":
        return None
    dtype = torch.float32 if stage.parallel.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, tokenizer.special, compute_dtype=dtype)
    mark_trained(chain, stage)
    stand_in_teachers(chain)
    kept = activation_bytes(chain, blank_states(stage, tokenizer, torch.device("meta")))
    costs = stage_costs(chain, stage)
    division = divide_stage(chain, stage)
    assert division is not None
    parts, total = [[chain.passes[place] for place in part] for part in division.cuts], sum(costs.values())
    stages, steps = len(parts), stage.batch.gradient_accumulation_steps

    trained = trained_elements(chain)

    def parameters(names: Iterable[str]) -> int:
        return sum(one.numel() for name in names for one in chain.get_submodule(name).parameters())

    return {
        "by": "estimated operations" if stage.parallel.pipeline_profile is None else "measured seconds",
        "stages": [
            {
                "layers": [pass_label(*part[0]), pass_label(*part[-1])],
                "cost": sum(costs[one] for one in part) / total,
                "parameters": parameters(division.held(number)),
                "copies": parameters(division.copied(number)),
                "activation_bytes": sum(kept[one] for one in part),
                "micro_batches_held": min(stages - number, steps),
            }
            for number, part in enumerate(parts)
        ],
        "bubble": (stages - 1) / (stages - 1 + steps),
        "tied": {name: [number + 1 for number in division.stages_of[name]] for name in division.tied},
        "tied_bytes_per_step": 8 * sum(trained[name] for number in range(stages) for name in division.copied(number)),
    }


def _memory(stage: StagePlan, tokens: SpecialTokens, processes: int) -> dict[str, int] | None:
    """Bytes of one process under ZeRO-3: its share of the model, and temporary memory; None for other hosts."""
    if stage.parallel.host != "zero" or stage.parallel.zero_stage < 3:
        return None
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, tokens)
    mark_trained(chain, stage)
    store_frozen(chain, stage.model.stacks)
    sizes, matrices = ZeroSizes.of(chain.layers), muon_parameters(chain, stage.optimizer)
    moved = sum(one.numel() for one in chain.parameters() if one.requires_grad and id(one) in matrices)
    return {
        "share": sizes.share_bytes(chain.layers, processes, matrices),
        "transient": sizes.transient_bytes(moved // processes),
    }


def count_parameters(stage: StagePlan, tokens: SpecialTokens) -> dict[str, int]:
    """Numbers of parameters by stack, of a chain built without memory.

    Returns:
        Stacks (``visual``, ``text`` ...) without momentum twins, then ``trained``, ``frozen`` and ``momentum`` (those
        of twins). Frozen are those that the stage names, and those that no step gives a gradient.

    Raises:
        UserError: The configuration does not fit together.
    """
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, tokens)
    mark_trained(chain, stage)
    parts: Counter[str] = Counter()
    marked: Counter[str] = Counter({"trained": 0, "frozen": 0, "momentum": 0})
    for name, parameter in chain.named_parameters():
        if only_trains(name):
            marked["momentum"] += parameter.numel()
        else:
            parts[stack_of(name)] += parameter.numel()
            marked["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return {**parts, **marked}


def _host(stage: StagePlan) -> str:
    parallel = stage.parallel
    if parallel.host == AUTO:
        return "auto: chosen when the run starts, and with it the micro-batch"
    name = f"zero-{parallel.zero_stage}" if parallel.host == "zero" else parallel.host
    if parallel.host == "pipeline":
        return f"pipeline of {parallel.pipeline_stages} stages, zero-{parallel.zero_stage}"
    offloaded = "" if parallel.offload == "none" else f", {parallel.offload} offloaded to {parallel.offload_device}"
    size = parallel.expert_parallel_size if stage.model.sparse and parallel.host != "plain" else 1
    split = "" if size == 1 else f", experts split over {size} processes".replace("auto", "a machine's")
    return f"{name}{offloaded}{split}"
