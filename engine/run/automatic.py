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


def leaves_open(plan: Plan) -> bool:
    """Whether the layout of a stage has to be chosen."""
    return any(stage.parallel.host == AUTO for stage in plan.stages)


def with_layouts(plan: Plan, earlier: Plan | None, device: torch.device) -> tuple[Plan, list[str]]:
    """The plan with a layout for every stage that leaves it open. Called by every process.

    Args:
        plan: Without ``auto`` as a precision.
        earlier: That of the run's earlier start, on rank 0: a stage keeps its layout where as many processes take the
            same samples. None: it has none, or nothing stays of it.
        device: Where this process computes.

    Returns:
        The plan, and what was taken and why.

    Raises:
        PlanError: No layout of a stage fits.
    """
    if not leaves_open(plan):
        return plan, []
    local = local_processes()
    hardware = measure_hardware(device, local_processes=local, seconds=_SECONDS)
    text = ranks.on_first(
        lambda: _chosen(plan, earlier, Cluster(hardware, -(-ranks.world_size() // local), local)), str
    )
    told: dict[str, tuple[Choice, str]] = json.loads(text)
    stages = tuple(_with(stage, told[stage.name][0]) if stage.name in told else stage for stage in plan.stages)
    first = next(stage for stage in stages if stage.name in told)
    shared = replace(plan.parallel, **_values(first)["parallel"]) if plan.parallel.host == AUTO else plan.parallel
    notes = [f"stage {name}: parallel: auto takes {why}" for name, (_, why) in told.items()]
    return replace(plan, parallel=shared, stages=stages), notes


def _chosen(plan: Plan, earlier: Plan | None, cluster: Cluster) -> str:
    """The choices by stage, each with what to say about it, as JSON."""
    tokenizer, found = load_tokenizer(plan.tokenizer), dict[str, tuple[Choice, str]]()
    for stage in plan.stages:
        if stage.parallel.host != AUTO:
            continue
        kept = _kept(stage, () if earlier is None else earlier.stages, cluster.processes)
        if kept is not None:
            found[stage.name] = _values(kept), "what the run began with"
            continue
        best, why = choose_layout(stage, tokenizer, cluster)
        found[stage.name] = _values(best.stage), f"{layout_name(best)}: {why}"
    return json.dumps(found)


def _kept(stage: StagePlan, earlier: Sequence[StagePlan], processes: int) -> StagePlan | None:
    """The stage with the layout that it has had, if that takes the same samples on so many processes."""
    before = next((one for one in earlier if one.name == stage.name), None)
    if before is None or before.parallel.host == AUTO:
        return None
    own = _with(stage, _values(before))
    whole = own.parallel.host != "pipeline" or processes % own.parallel.pipeline_stages == 0
    same = own.samples_per_step(processes) == stage.samples_per_step(processes)
    return own if whole and same else None


def _values(stage: StagePlan) -> Choice:
    sections = {name: asdict(getattr(stage, name)) for name in _CHOSEN}
    return {name: {field: sections[name][field] for field in fields} for name, fields in _CHOSEN.items()}


def _with(stage: StagePlan, choice: Choice) -> StagePlan:
    return replace(
        stage,
        parallel=replace(stage.parallel, **choice["parallel"]),
        batch=replace(stage.batch, **choice["batch"]),
    )
