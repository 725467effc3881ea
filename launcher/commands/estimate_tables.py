"""Estimates as tables for people and as plain values for scripts."""

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.estimate.activities import BUBBLE, COMPUTE
from engine.estimate.failures import (
    Faults,
    daly_goodput,
    daly_interval,
    simulate_run,
    stretched_steps,
    sweep_intervals,
    young_interval,
)
from engine.estimate.report import StageEstimate
from engine.estimate.search import Found, layout_name, overrides_of
from engine.estimate.training import Training
from engine.plan.plan import StagePlan
from engine.telemetry.console import PlainTable
from omnivl.chain.names import stack_of

_GIB = 2**30
_INTERVALS = (0.25, 0.5, 1.0, 2.0, 4.0)
_SHOWN = 12
LOADER = "the loader"


def parameters_by_part(figures: StageEstimate) -> dict[str, int]:
    """Trained parameters by stack."""
    parts: dict[str, int] = {}
    for name, size in figures.work.layers.items():
        stack = stack_of(name)
        parts[stack] = parts.get(stack, 0) + size.trained
    return {part: count for part, count in parts.items() if count}


def as_json(figures: StageEstimate) -> dict[str, Any]:
    """Everything, as JSON would have it; bytes, seconds and operations without prefixes."""
    sizes, step, memory = figures.work.layers.values(), figures.step, figures.memory
    hardware = figures.cluster.hardware
    images = figures.samples_per_second * figures.work.frames
    decoding = figures.loading.get("decoding")
    return {
        "layout": layout_name(figures),
        "parameters": {
            "trained": sum(size.trained for size in sizes),
            "active": sum(size.active for size in sizes),
            "frozen": sum(size.frozen for size in sizes),
            "twins": sum(size.twins for size in sizes),
            "parts": parameters_by_part(figures),
        },
        "flops_per_sample": figures.work.useful_flops,
        "flops_per_step": figures.flops_per_step,
        "samples_per_step": figures.samples,
        "memory": {**memory.causes, "host": memory.host, "peak": memory.peak, "moment": memory.moment},
        "memory_by_pipeline_stage": [one.peak for one in figures.memories],
        "fits": figures.fits,
        "traffic": {
            cause: {
                "within_node": one.within,
                "between_nodes": one.between,
                "seconds": one.seconds(hardware),
                "exposed_seconds": step.exposed.get(cause, 0.0),
            }
            for cause, one in step.traffic.items()
        },
        "seconds": figures.seconds,
        "seconds_without_loader": step.seconds,
        "seconds_by_cause": dict(step.exposed) | ({LOADER: waits} if (waits := figures.loader_waits) else {}),
        "compute_by_limit": dict(step.compute_parts),
        "bubble": step.bubble,
        "samples_per_second": figures.samples_per_second,
        "mfu": figures.mfu,
        "limit": figures.limits,
        "data": {
            "bytes_per_second": figures.data_bytes_per_second,
            "bytes_per_second_per_node": figures.data_bytes_per_second / figures.cluster.nodes,
            "images_per_second_per_node": images / figures.cluster.nodes,
            "decoding_share": None if decoding is None else decoding / figures.seconds,
        },
        "checkpoint_bytes": figures.checkpoint_bytes,
    }


def stage_tables(figures: StageEstimate) -> list[PlainTable]:
    """Tables of one stage: sizes and speed, memory, time of a step, traffic."""
    told = as_json(figures)
    return [_summary(figures, told), _memory(figures, told), _time(told), _traffic(told)]


def _summary(figures: StageEstimate, told: dict[str, Any]) -> PlainTable:
    hardware, cluster, data = figures.cluster.hardware, figures.cluster, told["data"]
    table = PlainTable(
        title=f"Stage {figures.stage.name} on {cluster.nodes} x {cluster.per_node} {hardware.name}: {told['layout']}",
        show_header=False,
    )
    sizes = told["parameters"]
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes["parts"].items())
    table.add_row("parameters", f"{sizes['trained'] / 1e6:.1f} M, active {sizes['active'] / 1e6:.1f} M ({parts})")
    if sizes["twins"] or sizes["frozen"]:
        table.add_row("at rest", f"twins {sizes['twins'] / 1e6:.1f} M, frozen {sizes['frozen'] / 1e6:.1f} M")
    table.add_row("samples", f"{told['samples_per_step']:,} a step, {told['samples_per_second']:,.0f} a second")
    flops = f"{told['flops_per_sample'] / 1e9:,.1f} GFLOP a sample, {told['flops_per_step'] / 1e15:,.3f} PFLOP a step"
    table.add_row("operations", flops)
    table.add_row("step", f"{told['seconds']:.4g} s, MFU {told['mfu']:.1%}")
    table.add_row("limit", told["limit"])
    if figures.division is not None:
        table.add_row("bubble", f"{told['bubble']:.1%} of the pipeline's time")
    share = data["decoding_share"]
    cores = "" if share is None else f" ({share:.0%} of what its cores decode)"
    images = f"{data['images_per_second_per_node']:,.0f} images a second to decode on a node{cores}"
    table.add_row("data", f"{data['bytes_per_second'] / 1e9:.3g} GB/s from storage, {images}")
    table.add_row("checkpoint", f"{told['checkpoint_bytes'] / 1e9:.3g} GB")
    return table


def training_table(names: Sequence[str], training: Training) -> PlainTable:
    """Hours, GPU-hours, samples, epochs and cost of stages."""
    table = PlainTable(title=f"All steps of {' and '.join(names)}, without evaluation and failures", show_header=False)
    table.add_row("time", f"{training.hours:,.3g} hours, {training.gpu_hours:,.4g} GPU-hours")
    table.add_row("samples seen", f"{training.samples:,}")
    for stage, epochs in training.epochs.items():
        for entry, count in epochs.items():
            name = entry if len(training.epochs) == 1 else f"{stage}, {entry}"
            unknown = "not known, as its samples cannot be counted here (--samples)"
            table.add_row(f"epochs of {name}", unknown if count is None else f"{count:,.3g}")
    if training.cost is not None:
        table.add_row("cost", f"{training.cost:,.2f}")
    return table


def _memory(figures: StageEstimate, told: dict[str, Any]) -> PlainTable:
    memory = told["memory"]
    fits = "fits" if figures.fits else "does not fit"
    limit = figures.cluster.hardware.memory_gib
    table = PlainTable("memory of the fullest process", "GiB")
    for cause in figures.memory.causes:
        table.add_row(cause, f"{memory[cause] / _GIB:.2f}")
    table.add_row(
        f"most at once ({memory['moment']})", f"{memory['peak'] / _GIB:.2f} of {limit:.0f}: {fits}", style="bold"
    )
    if memory["host"]:
        table.add_row("in the host's memory", f"{memory['host'] / _GIB:.2f}")
    if len(figures.memories) > 1:
        stages = ", ".join(f"{one.peak / _GIB:.2f}" for one in figures.memories)
        table.add_row("pipeline stages", stages)
    return table


def _time(told: dict[str, Any]) -> PlainTable:
    table = PlainTable("time of a step", "ms", "share")
    rows = {f"{COMPUTE}: {limit}": seconds for limit, seconds in told["compute_by_limit"].items()}
    rows |= {f"waits for {cause}": s for cause, s in told["seconds_by_cause"].items() if cause not in (COMPUTE, BUBBLE)}
    if told["bubble"]:
        rows[BUBBLE] = told["seconds_by_cause"].get(BUBBLE, 0.0)
    for name, seconds in rows.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / told['seconds']:.1%}")
    table.add_row("step", f"{1e3 * told['seconds']:.2f}", "", style="bold")
    return table


def _traffic(told: dict[str, Any]) -> PlainTable:
    table = PlainTable("sent by a process in a step", "GB in its node", "GB to others", "ms")
    for cause, one in told["traffic"].items():
        within, between = one["within_node"] / 1e9, one["between_nodes"] / 1e9
        table.add_row(cause, f"{within:.3g}", f"{between:.3g}", f"{1e3 * one['seconds']:.2f}")
    return table


def pasted(planned: StagePlan, found: StageEstimate, given: Sequence[str]) -> str:
    """The overrides of a layout, after those that were given already, as a shell takes them."""
    return shlex.join([*given, *overrides_of(planned, found.stage)])


def found_json(found: Found, planned: StagePlan) -> dict[str, Any]:
    """What a search found, as JSON would have it; ``planned`` is the stage without the layouts."""
    ranked = [
        {
            **{"layout": layout_name(one), "seconds": one.seconds, "mfu": one.mfu},
            **{"samples_per_second": one.samples_per_second, "peak_bytes": one.memory.peak, "limit": one.limits},
            "overrides": overrides_of(planned, one.stage),
        }
        for one in found.ranked
    ]
    return {"ranked": ranked, "too_large": found.too_large}


def shown(found: Found) -> Sequence[StageEstimate]:
    """The layouts that are printed."""
    return found.ranked[:_SHOWN]


def found_table(found: Found) -> PlainTable:
    """The fastest layouts that fit."""
    title = f"{len(found.ranked)} layouts fit, {found.too_large} do not"
    table = PlainTable("", "layout", "s a step", "samples/s", "MFU", "GiB", "limit", title=title)
    for number, one in enumerate(shown(found), 1):
        table.add_row(
            *(str(number), layout_name(one), f"{one.seconds:.4g}", f"{one.samples_per_second:,.0f}", f"{one.mfu:.1%}"),
            *(f"{one.memory.peak / _GIB:.1f}", one.limits),
        )
    if not found.ranked and found.smallest is not None:
        least = found.smallest
        table.add_row(
            "", f"the smallest: {layout_name(least)}", "", "", "", f"{least.memory.peak / _GIB:.1f}", "too large"
        )
    return table


def failure_figures(figures: StageEstimate, faults: Faults, seconds: float, seed: int) -> dict[str, Any]:
    """Goodput by checkpoint interval, around the best one, and the cost of uneven devices.

    Args:
        figures: The estimate of the stage.
        faults: Failures and slow devices.
        seconds: Length of the run.
        seed: Seed of the draws.
    """
    best = daly_interval(faults)
    replicas = figures.stage.parallel.replicas(figures.cluster.processes)
    steps = np.maximum(
        stretched_steps(figures.step.activities, faults, replicas, seed=seed), max(figures.loading.values(), default=0)
    )
    runs = sweep_intervals(faults, [share * best for share in _INTERVALS], seconds, seed)
    return {
        "mean_seconds_between_failures": faults.mean_seconds,
        "checkpoint_seconds": faults.checkpoint_seconds,
        "restart_seconds": faults.restart_seconds,
        "young_interval": young_interval(faults),
        "daly_interval": best,
        "daly_steps": best / float(np.mean(steps)),
        "stretched_seconds": float(np.mean(steps)),
        "stretch": float(np.mean(steps)) / figures.seconds,
        "intervals": [{**vars(run), "expected": daly_goodput(faults, run.interval)} for run in runs],
        "goodput": simulate_run(faults, best, seconds, seed).goodput * figures.seconds / float(np.mean(steps)),
    }


def failure_table(told: dict[str, Any]) -> PlainTable:
    """Goodput by checkpoint interval."""
    title = (
        f"A failure every {told['mean_seconds_between_failures'] / 3600:,.1f} h, checkpoints of "
        f"{told['checkpoint_seconds']:.3g} s; uneven devices stretch a step {told['stretch']:.3f} times; best interval "
        f"{told['daly_interval']:,.0f} s (Daly), {told['daly_steps']:,.0f} steps; goodput {told['goodput']:.1%}"
    )
    columns = ("interval, s", "kept work", "expected", "checkpoints", "lost work", "restarts", "failures")
    table = PlainTable(*columns, title=title)
    for run in told["intervals"]:
        shares = (run[name] for name in ("goodput", "expected", "checkpoints", "lost", "restarts"))
        table.add_row(f"{run['interval']:,.0f}", *(f"{share:.2%}" for share in shares), f"{run['failures']:,}")
    return table
