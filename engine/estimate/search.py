"""Layouts of a stage that fit a cluster, the fastest first.

The samples of an optimizer step stay what the plan says, so that every layout trains the same: with a larger
micro-batch there are fewer accumulation steps. Work is counted once for each size of a micro-batch and each choice of
what is recomputed (the plan's, nothing, whole blocks), with rows joined over all processes; a pipeline joins fewer.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from engine.disk.run_folder import differing_fields
from engine.errors import PlanError
from engine.estimate.counts import Counts
from engine.estimate.report import SampleBytes, StageEstimate, estimate_stage
from engine.estimate.traffic import Cluster
from engine.plan.parallel import Offload, ParallelConfig
from engine.plan.plan import SHARED_SECTIONS, StagePlan
from moe.ranges import AUTO
from omnivl.architectures.build import outline
from omnivl.data.tokenizer import Tokenizer
from omnivl.parts.sizes import Recompute

_OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")
_RECOMPUTED: tuple[Recompute, ...] = ("none", "block")
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        ranked: Layouts that fit, the fastest first.
        too_large: How many do not fit.
        smallest: Of those that do not, the one that needs least memory; None where all fit.
    """

    ranked: tuple[StageEstimate, ...]
    too_large: int
    smallest: StageEstimate | None


def search_layouts(
    stage: StagePlan,
    tokenizer: Tokenizer,
    cluster: Cluster,
    *,
    micro_batches: int = 3,
    sample_bytes: SampleBytes | None = None,
    decoded_images_per_second: float | None = None,
    counts: Counts | None = None,
    recomputed: Sequence[Recompute] = _RECOMPUTED,
    allowed: Callable[[StagePlan], bool] = lambda candidate: True,
    progress: Callable[[str], object] = lambda layout: None,
) -> Found:
    """Estimates all layouts that the hosts allow.

    Args:
        stage: Model, objectives, samples of a step.
        tokenizer: The plan's.
        cluster: Where.
        micro_batches: Number of micro-batch sizes to try: the plan's, and powers of two around it. A pipeline is also
            tried with the size at which its fewer replicas hold as many samples together.
        sample_bytes: Size of samples in storage.
        decoded_images_per_second: See ``estimate_stage``.
        counts: Keeps what is counted; None: nothing was counted before, and captions are as long as the model reads.
        recomputed: What else is recomputed besides what the stage says.
        allowed: Whether a layout is tried.
        progress: Called with each micro-batch size whose work is being counted.
    """
    samples = stage.samples_per_step(cluster.processes)
    counts = Counts(tokenizer, cluster) if counts is None else counts
    fitting: list[StageEstimate] = []
    others: list[StageEstimate] = []
    planned, tried = stage.batch.micro_batch_size_per_gpu, list(layouts(stage, cluster))
    sizes = _sizes(planned, samples // cluster.processes, micro_batches)
    joined = {planned * cluster.processes // parallel.replicas(cluster.processes) for parallel in tried}
    modes = dict.fromkeys((*stage.model.recomputed, *recomputed))
    for size, mode, parallel in itertools.product(sorted({*sizes, *joined}), modes, tried):
        replicas = parallel.replicas(cluster.processes)
        accumulation, rest = divmod(samples, size * replicas)
        if rest or accumulation == 0 or (size not in sizes and size * replicas != planned * cluster.processes):
            continue
        if size != planned and any(any(one.misfits(stage.model.inputs, size)) for one in stage.objectives):
            continue
        batch = replace(stage.batch, micro_batch_size_per_gpu=size, gradient_accumulation_steps=accumulation)
        model = stage.model.recomputing(mode)
        candidate = replace(stage, parallel=parallel, batch=batch, model=model)
        if not allowed(candidate):
            continue
        try:
            found = estimate_stage(
                candidate,
                tokenizer,
                cluster,
                work=counts.work(candidate, progress),
                chain=counts.outline(candidate),
                sample_bytes=sample_bytes or SampleBytes(),
                decoded_images_per_second=decoded_images_per_second,
            )
        except PlanError:  # experts cannot be split, or layers cut, like this
            continue
        (fitting if found.fits else others).append(found)
    fitting.sort(key=lambda one: (one.seconds, one.step.seconds))  # a slow loader makes all of them equally slow
    return Found(tuple(fitting), len(others), min(others, key=lambda one: one.memory.peak, default=None))


def choose_layout(
    stage: StagePlan,
    tokenizer: Tokenizer,
    cluster: Cluster,
    *,
    micro_batches: int = 3,
    counts: Counts | None = None,
    progress: Callable[[str], object] = lambda layout: None,
) -> tuple[StageEstimate, str]:
    """The layout of a stage whose host is ``auto``: the fastest that fits and compares as many samples as planned.

    Recomputation stays as the plan says. What the loader takes is left out: it is the same for every layout.

    Args:
        stage: What is planned.
        tokenizer: The plan's.
        cluster: Where.
        micro_batches: See ``search_layouts``.
        counts: Likewise.
        progress: Likewise.

    Returns:
        The layout, and why: its figures and those of the best one with another host.

    Raises:
        PlanError: None fits.
    """
    planned = replace(stage, parallel=replace(stage.parallel, host="zero"))
    experts, joined = planned.parallel.expert_parallel_size, planned.batch.micro_batch_size_per_gpu * cluster.processes
    accumulated = replace(planned, batch=replace(planned.batch, gradient_accumulation_steps=2))
    within = accumulated.compared_within_a_micro_batch

    def allowed(one: StagePlan) -> bool:
        same = one.batch.micro_batch_size_per_gpu * one.parallel.replicas(cluster.processes) == joined
        return (same or not within) and experts in (AUTO, one.parallel.expert_parallel_size)

    found = search_layouts(
        planned,
        tokenizer,
        cluster,
        micro_batches=micro_batches,
        counts=counts,
        recomputed=(),
        allowed=allowed,
        progress=progress,
    )
    ranked = sorted(found.ranked, key=lambda one: one.step.seconds)
    if not ranked:
        least = found.smallest
        needs = "" if least is None else f"; the smallest needs {least.memory.peak / 2**30:.1f} GiB"
        raise PlanError(
            [
                f"stages.{stage.name}.parallel: got 'auto'; allowed is a layout that fits {cluster.processes} "
                f"{cluster.hardware.name} of {cluster.hardware.memory_gib:.0f} GiB, and of {found.too_large} that "
                f"leave what is compared as it is none does{needs}; take more devices, a smaller micro-batch, or "
                "model.recompute: block"
            ]
        )
    best = ranked[0]
    other = next((one for one in ranked if one.stage.parallel.host != best.stage.parallel.host), None)
    why = f"estimated at {_figures(best)}"
    why += "" if other is None else f", {layout_name(other)} at {_figures(other)}"
    why += f"; {found.too_large} others need more memory" if found.too_large else ""
    return best, why


def _figures(one: StageEstimate) -> str:
    return f"{one.step.seconds:.3g} s a step and {one.memory.peak / 2**30:.2g} GiB"


def layouts(stage: StagePlan, cluster: Cluster) -> Iterator[ParallelConfig]:
    """Every layout of the hosts on so many processes, whether or not it fits."""
    base, processes, seen = stage.parallel, cluster.processes, set[tuple[object, ...]]()
    most = max((ffn.num_experts for ffn in stage.model.sparse.values()), default=1)
    given = [size for size in (base.expert_parallel_size,) if isinstance(size, int) and processes % size == 0]
    experts = [size for size in sorted({*_powers(processes), *given}) if size <= most]
    passes = len(outline(stage.model).passes)
    stages = [size for size in _powers(processes) if 1 < size <= passes]
    piped = replace(base, host="pipeline", zero_stage=1, offload="none", pipeline_profile=None)
    candidates = [replace(base, host="plain", offload="none", expert_parallel_size=1)]
    for size in experts:
        for zero in (1, 2, 3):
            candidates += [
                replace(base, host="zero", zero_stage=zero, offload=offload, expert_parallel_size=size)
                for offload in _OFFLOADS[: 3 if zero == 3 else 2]
            ]
        candidates += [
            replace(piped, expert_parallel_size=size, pipeline_stages=count)
            for count in stages
            if (processes // count) % size == 0
        ]
    for candidate in candidates:
        key = tuple(asdict(candidate).values())
        if key not in seen:
            seen.add(key)
            yield candidate


def layout_name(figures: StageEstimate) -> str:
    """The layout in a few words."""
    parallel, batch = figures.stage.parallel, figures.stage.batch
    words = {
        "plain": "plain",
        "zero": f"ZeRO-{parallel.zero_stage}",
        "pipeline": f"pipeline of {parallel.pipeline_stages}, ZeRO-{parallel.zero_stage}",
    }[parallel.host]
    words += f", experts over {figures.expert_parallel}" if figures.expert_parallel > 1 else ""
    words += f", {parallel.offload} offloaded" if parallel.offload != "none" else ""
    recomputed = " and ".join(figures.stage.model.recomputed)
    words += f", {recomputed} recomputed" if recomputed != "none" else ""
    return f"{words}, {batch.micro_batch_size_per_gpu} x {batch.gradient_accumulation_steps}"


def overrides_of(planned: StagePlan, found: StagePlan) -> list[str]:
    """The overrides, ``path=value``, that turn the planned stage into the one that was found."""
    sections = ((name, asdict(getattr(planned, name)), asdict(getattr(found, name))) for name in SHARED_SECTIONS)
    return [
        f"stages.{planned.name}.{path}={json.dumps(now)}"
        for name, before, after in sections
        for path, _, now in differing_fields(before, after, name)
    ]


def _powers(limit: int) -> list[int]:
    """Powers of two that divide a number of processes."""
    return [2**exponent for exponent in range(limit.bit_length()) if limit % 2**exponent == 0]


def _sizes(planned: int, most: int, count: int) -> list[int]:
    """The planned micro-batch and the powers of two nearest to it by ratio, the larger first among equals.

    None is above a process' samples of a step.
    """
    others = (size for size in _MICRO_BATCHES if size != planned and size <= most)
    near = sorted(others, key=lambda size: (abs(math.log2(size / planned)), -size))
    return sorted([planned, *near[: max(0, count - 1)]])
