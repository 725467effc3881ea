"""``omnivl estimate``: memory, traffic and time of a plan on a cluster that need not exist."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.estimate.counts import Counts
from engine.estimate.failures import Faults
from engine.estimate.hardware import load_hardware
from engine.estimate.report import SampleBytes, StageEstimate, estimate_stage
from engine.estimate.search import Found, choose_layout, layout_name, search_layouts
from engine.estimate.skew import loads_by_stage
from engine.estimate.traffic import Cluster
from engine.estimate.training import training_of
from engine.estimate.vocabulary import tokenizer_or_size
from engine.plan.parse import load_plan
from engine.plan.precision import with_precision
from engine.telemetry.console import PlainConsole, plain_text
from launcher.commands.estimate_tables import (
    as_json,
    failure_figures,
    failure_table,
    found_json,
    found_table,
    pasted,
    shown,
    stage_tables,
    training_table,
)
from moe.ranges import AUTO
from omnivl.errors import UserError


def estimate(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file, or a run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value, e.g. parallel.zero_stage=3", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each; the hardware's where it is not given.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="a100, a100-40gb, h100, h100-500w, h200, b200, or a YAML file (`omnivl measure`).")
    ] = "h100",
    stage: Annotated[str | None, typer.Option(help="This stage only.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts that fit.")] = False,
    micro_batches: Annotated[int, typer.Option(min=1, help="Sizes of micro-batches that a search tries.")] = 3,
    failures: Annotated[bool, typer.Option("--failures", help="Simulate a long run with failures.")] = False,
    node_hours: Annotated[float, typer.Option(min=0.01, help="Mean hours until a node fails.")] = 20_000.0,
    checkpoint_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="That a checkpoint takes from training; its bytes over storage if not given."),
    ] = None,
    restart_minutes: Annotated[float, typer.Option(min=0, help="From a failure to training again.")] = 10.0,
    jitter: Annotated[
        float, typer.Option(min=0, help="Deviation of the logarithm of a device's speed, by step.")
    ] = 0.0,
    slow_share: Annotated[float, typer.Option(min=0, max=1, help="Share of devices that are slow in a step.")] = 0.0,
    slow_factor: Annotated[float, typer.Option(min=1, help="How many times as long they take.")] = 1.0,
    days: Annotated[float, typer.Option(min=0.01, help="Length of the simulated run.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    image_kb: Annotated[float, typer.Option(min=0, help="Kilobytes of an image in storage.")] = 100.0,
    clip_kb: Annotated[float, typer.Option(min=0, help="Kilobytes of a clip in storage.")] = 1000.0,
    images_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="That a node reads and decodes; the hardware's if not given.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of each stage's first data entry, for epochs; counted where it is here.")
    ] = None,
    words: Annotated[
        int | None, typer.Option(min=1, help="Of a caption; as many as the model reads where it is not given.")
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(help="routing.parquet of an evaluation: experts' loads; even where it is not given.")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="Of a GPU (process); prints the cost.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Works out parameters, memory, traffic, time and what limits it, of each stage of a plan.

    Examples:
      omnivl estimate configs/plans/beit3_large.yaml --nodes 8 --hardware h100 --price-per-gpu-hour 3
      omnivl estimate configs/plans/beit3_large.yaml --nodes 8 --search
      omnivl estimate configs/plans/beit3_giant.yaml --nodes 16 --failures --days 7
      omnivl estimate configs/plans/clip_b16.yaml --nodes 8 --words 22
      omnivl estimate configs/plans/quickstart.yaml --routing runs/quickstart/stages/03-joint/routing.parquet
    """
    machine = load_hardware(hardware)
    cluster = Cluster(machine, nodes, gpus_per_node or machine.processes_per_node)
    read = with_precision(load_plan(plan, overrides or (), cluster.processes), machine.faster_precision)
    tokenizer = tokenizer_or_size(read)
    chosen = [one for one in read.stages if stage in (None, one.name)]
    if not chosen:
        known = ", ".join(one.name for one in read.stages)
        raise UserError(f"--stage: got {stage!r}; allowed are {known}; name one of them")
    counts = Counts(tokenizer, cluster, words)
    open_counts = counts if words is None else Counts(tokenizer, cluster)  # a run does not know how long captions are
    loads = {} if routing is None else loads_by_stage(routing, {one.name: counts.outline(one) for one in chosen})
    console = PlainConsole()
    told: dict[str, Any] = {}
    estimated: list[StageEstimate] = []
    cache = read.loader.index_cache
    sizes = SampleBytes(1e3 * image_kb, 1e3 * clip_kb)
    for one in chosen:
        found: Found | None = None
        if search:
            with PlainConsole(stderr=True).status(f"stage {one.name}") as status:
                found = search_layouts(
                    one,
                    tokenizer,
                    cluster,
                    micro_batches=micro_batches,
                    sample_bytes=sizes,
                    decoded_images_per_second=images_per_second,
                    counts=counts,
                    progress=lambda what: status.update(plain_text(what)),
                )
        planned = one
        if one.parallel.host == AUTO:
            chosen_layout, why = choose_layout(one, tokenizer, cluster, counts=open_counts)
            if not json_output:
                console.print(
                    f"stage {one.name}: parallel: auto takes {layout_name(chosen_layout)}: {why}", soft_wrap=True
                )
            one = chosen_layout.stage
        figures = estimate_stage(
            one,
            tokenizer,
            cluster,
            # A pipeline joins rows of fewer replicas than were counted.
            work=counts.work(one) if one.parallel.host != "pipeline" else None,
            chain=counts.outline(one),
            sample_bytes=sizes,
            decoded_images_per_second=images_per_second,
            words=words,
            loads=loads.get(one.name),
        )
        estimated.append(figures)
        training = training_of([figures], index_cache=cache, price=price_per_gpu_hour, samples=samples)
        told[one.name] = as_json(figures) | {"training": asdict(training)}
        if found is not None:
            told[one.name]["search"] = found_json(found, planned)
        faults = _faults(figures, node_hours, checkpoint_seconds, restart_minutes) if failures else None
        if faults is not None:
            faults = replace(faults, jitter=jitter, slow_share=slow_share, slow_factor=slow_factor)
            told[one.name]["failures"] = failure_figures(figures, faults, 86400 * days, seed)
        if not json_output:
            for table in stage_tables(figures):
                console.print(table)
            console.print(training_table([one.name], training))
            if found is not None:
                console.print(found_table(found))
                for number, layout in enumerate(shown(found), 1):
                    console.print(f"overrides of {number}:", pasted(planned, layout, overrides or ()), soft_wrap=True)
            if faults is not None:
                console.print(failure_table(told[one.name]["failures"]))
    whole = training_of(estimated, index_cache=cache, price=price_per_gpu_hour, samples=samples)
    if len(estimated) > 1 and not json_output:
        console.print(training_table([one.name for one in chosen], whole))
    if json_output:
        head = {"hardware": machine.name, "nodes": nodes, "processes": cluster.processes}
        typer.echo(json.dumps({**head, "stages": told, "training": asdict(whole)}, indent=1))


def _faults(figures: StageEstimate, node_hours: float, checkpoint: float | None, restart_minutes: float) -> Faults:
    """The faults of the cluster; all nodes write a checkpoint to storage at the same time."""
    cluster = figures.cluster
    rate = cluster.hardware.storage_gigabytes_per_second * 1e9 * cluster.nodes
    seconds = figures.checkpoint_bytes / rate if checkpoint is None else checkpoint
    return Faults(node_hours, cluster.nodes, seconds, 60 * restart_minutes)
