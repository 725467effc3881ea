"""The layout of stages whose plan says ``parallel: auto``, chosen when a run starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from engine.estimate.measure import measure_hardware
from engine.estimate.search import choose_layout, layout_name
from engine.estimate.traffic import Cluster
from engine.plan.plan import Plan, StagePlan
from engine.processes import ranks
from engine.processes.process_group import local_processes
from engine.run.earlier import Earlier, Start
from engine.telemetry.console import PlainConsole, plain_text
from moe.ranges import AUTO
from omnivl.data.tokenizer import load_tokenizer

_SECONDS = 0.1
"""Length of each measurement of this machine."""

_CHOSEN: Mapping[str, tuple[str, ...]] = {
    "parallel": ("host", "zero_stage", "offload", "expert_parallel_size", "pipeline_stages"),
    "batch": ("micro_batch_size_per_gpu", "gradient_accumulation_steps"),
}
"""What is chosen, by section of a stage."""

Choice = dict[str, dict[str, Any]]
"""Values of those fields."""


def with_layouts(plan: Plan, earlier: Earlier, start: Start, device: torch.device) -> tuple[Plan, list[str]]:
    """The plan with a layout for every stage that leaves it open. Called by every process.

    Args:
        plan: Without ``auto`` as a precision.
        earlier: The run's earlier start, which rank 0 alone reads. On as many processes, its stages keep their layouts.
        start: What is deleted of it.
        device: Where this process computes.

    Returns:
        The plan, and what was taken and why.

    Raises:
        PlanError: No layout of a stage fits.
        RunFileError: The earlier start's plan cannot be read.
    """
    due = _due(plan)
    if not due:
        return plan, []
    choices: dict[str, Choice] = json.loads(ranks.on_first(lambda: json.dumps(_kept(due, earlier, start)), str))
    notes = [f"stage {name}: parallel: auto takes what the run began with" for name in choices]
    due = [stage for stage in due if stage.name not in choices]
    if due:
        hardware = measure_hardware(device, local_processes=local_processes(), seconds=_SECONDS)
        cluster = Cluster(hardware, ranks.world_size() // hardware.processes_per_node, hardware.processes_per_node)
        found: dict[str, Any] = json.loads(ranks.on_first(lambda: _chosen(due, plan.tokenizer, cluster), str))
        choices |= {name: choice for name, (choice, _) in found.items()}
        notes += [f"stage {name}: parallel: auto takes {why}" for name, (_, why) in found.items()]
    return _with_choices(plan, choices), notes


def as_before(plan: Plan, earlier: Earlier) -> Plan:
    """The plan with the layouts that its open stages had at the run's earlier start, on however many processes.

    It is what can be compared with the earlier plan before layouts are searched. A stage with other samples in a step
    has its own micro-batches.
    """
    processes, choices = ranks.world_size(), dict[str, Choice]()
    had = {} if earlier.plan is None else {one.name: one for one in earlier.plan.stages}
    for stage in _due(plan):
        if (before := had.get(stage.name)) is not None:
            same = before.samples_per_step(processes) == stage.samples_per_step(processes)
            choices[stage.name] = {**_values(before), **({} if same else {"batch": _values(stage)["batch"]})}
    return _with_choices(plan, choices)


def _due(plan: Plan) -> list[StagePlan]:
    return [stage for stage in plan.stages if stage.parallel.host == AUTO]


def _with_choices(plan: Plan, choices: Mapping[str, Choice]) -> Plan:
    """The plan with a layout for each stage that has one; what is said for all stages becomes that of the first."""
    if not choices:
        return plan
    stages = tuple(_with(stage, choices[stage.name]) if stage.name in choices else stage for stage in plan.stages)
    first = next(stage for stage in stages if stage.name in choices)
    shared = replace(plan.parallel, **_values(first)["parallel"]) if plan.parallel.host == AUTO else plan.parallel
    return replace(plan, parallel=shared, stages=stages)


def _kept(stages: Sequence[StagePlan], earlier: Earlier, start: Start) -> dict[str, Choice]:
    """The layouts that stages have had, where as many processes take the same samples now."""
    processes = ranks.world_size()
    if start.anew or earlier.plan is None or earlier.processes != processes:
        return {}
    had = {one.name: one for one in earlier.plan.stages if one.parallel.host != AUTO}
    return {
        stage.name: _values(had[stage.name])
        for stage in stages
        if stage.name in had and had[stage.name].samples_per_step(processes) == stage.samples_per_step(processes)
    }


def _chosen(stages: Sequence[StagePlan], tokenizer: str, cluster: Cluster) -> str:
    """The choices by stage, each with what to say about it, as JSON."""
    words, found = load_tokenizer(tokenizer), dict[str, tuple[Choice, str]]()
    console = PlainConsole()
    for stage in stages:

        def tell(what: str, name: str = stage.name) -> None:
            console.print(plain_text(f"stage {name}: parallel: auto: the work of {what} is counted"), soft_wrap=True)

        best, why = choose_layout(stage, words, cluster, progress=tell)
        found[stage.name] = _values(best.stage), f"{layout_name(best)}: {why}"
    return json.dumps(found)


def _values(stage: StagePlan) -> Choice:
    sections = {name: asdict(getattr(stage, name)) for name in _CHOSEN}
    return {name: {field: sections[name][field] for field in fields} for name, fields in _CHOSEN.items()}


def _with(stage: StagePlan, choice: Choice) -> StagePlan:
    return replace(
        stage,
        parallel=replace(stage.parallel, **choice["parallel"]),
        batch=replace(stage.batch, **choice["batch"]),
    )
