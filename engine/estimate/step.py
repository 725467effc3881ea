"""The estimate of one optimizer step: its time, the causes of it, and the traffic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.estimate.activities import (
    BOUNDARY,
    BUBBLE,
    COMPUTE,
    EXPERTS,
    GATHER,
    JOIN,
    REDUCE,
    Copies,
    StepActivities,
    StepBuilder,
    zero_stage,
)
from engine.estimate.events import Activity, Timeline
from engine.estimate.hardware import HardwareConfig
from engine.estimate.traffic import Cluster, Transfer
from engine.estimate.work import ModelWork
from engine.hosts.pipeline.division import Division
from engine.plan.plan import StagePlan


@dataclass(frozen=True)
class StepEstimate:
    """What one optimizer step takes.

    Attributes:
        seconds: In all.
        compute_parts: Of the forward and backward pass of the busiest process, by what limits the operations:
            ``products``, ``memory``, ``starting operations``.
        bubble: Share of the pipeline's time in which the mean stage waits; 0 without one.
        traffic: What one process sends in a step, by cause; of a pipeline the process that sends most.
        piped: Whether it is a pipeline.
        activities: The simulated activities, to simulate them again with slower devices.
    """

    seconds: float
    compute_parts: Mapping[str, float]
    bubble: float
    traffic: Mapping[str, Transfer]
    piped: bool
    activities: "StepActivities"

    @cached_property
    def exposed(self) -> Mapping[str, float]:
        """By cause, the seconds by which the step would be shorter if that cause took no time.

        Each takes a simulation of its own, so they are worked out when they are asked for.
        """
        built = self.activities
        causes = dict.fromkeys(activity.cause for activity in built.activities if activity.cause != COMPUTE)
        found = {cause: self.seconds - built.seconds(without=cause) for cause in causes}
        found[COMPUTE] = sum(self.compute_parts.values())
        if self.piped:
            found[BUBBLE] = self.bubble * self.seconds
        return found


def estimate_step(
    stage: StagePlan,
    work: ModelWork,
    cluster: Cluster,
    *,
    expert_parallel: int = 1,
    division: Division | None = None,
    copies: Copies | None = None,
) -> StepEstimate:
    """Simulates a step.

    Args:
        stage: Host, ZeRO stage, accumulation, offload.
        work: The stage's model.
        cluster: Where it runs.
        expert_parallel: Processes over which banks are cut.
        division: Which passes each pipeline stage makes; None without a pipeline.
        copies: That the host makes; None: DeepSpeed's.
    """
    wanted = stage.batch.gradient_accumulation_steps
    if division is not None:
        built = StepBuilder(stage, work, cluster, expert_parallel, division, copies).pipeline(wanted)
    else:
        layers = dict.fromkeys(work.layers, 0)
        whole = Division((range(len(work.passes)),), ((),), dict.fromkeys(layers, (0,)), layers)
        built = StepBuilder(stage, work, cluster, expert_parallel, whole, copies).whole(min(wanted, 2))
        built.wanted = wanted
        if wanted > 2:
            built.shorter = StepBuilder(stage, work, cluster, expert_parallel, whole, copies).whole(1)
    seconds = built.seconds()
    timeline = built.network.timeline()
    cuts = [range(len(work.passes))] if division is None else division.cuts
    parts = _busiest_parts(work, cluster.hardware, cuts, wanted)
    bubble = 0.0 if division is None else _bubble(timeline, built.activities, len(cuts))
    traffic: dict[str, Transfer] = {}
    for sent in built.traffic.values():
        for cause, one in sent.items():
            one = one * (wanted / built.micro_batches) if cause in _PER_MICRO_BATCH[zero_stage(stage)] else one
            known = traffic.get(cause, Transfer())
            traffic[cause] = max(known, one, key=lambda transfer: transfer.within + transfer.between)
    return StepEstimate(seconds, parts, bubble, traffic, division is not None, built)


_PER_MICRO_BATCH: Mapping[int, frozenset[str]] = {
    0: frozenset({JOIN, EXPERTS, BOUNDARY}),
    1: frozenset({JOIN, EXPERTS, BOUNDARY}),
    2: frozenset({JOIN, EXPERTS, BOUNDARY, REDUCE}),
    3: frozenset({JOIN, EXPERTS, BOUNDARY, REDUCE, GATHER}),
}
"""Causes of traffic that occur with every micro-batch, by ZeRO stage; the others occur once a step."""


def _busiest_parts(
    work: ModelWork, hardware: HardwareConfig, cuts: Sequence[range], micro_batches: int
) -> dict[str, float]:
    """Compute seconds of the slowest pipeline stage by limiting factor."""
    best: dict[str, float] = {}
    for part in cuts:
        found: dict[str, float] = {}
        for place in part:
            for operations in (work.passes[place].forward, work.passes[place].backward):
                for limit, seconds in hardware.parts(operations).items():
                    found[limit] = found.get(limit, 0.0) + micro_batches * seconds
        best = max(best, found, key=lambda parts: sum(parts.values()))
    return best


def _bubble(timeline: Timeline, activities: Sequence[Activity], stages: int) -> float:
    """Share of the time up to the last backward pass in which the mean stage neither computes nor sends."""
    end = max(
        end for end, activity in zip(timeline.ends, activities, strict=True) if activity.cause in (COMPUTE, BOUNDARY)
    )
    busy = sum(activity.seconds for activity in activities if activity.cause in (COMPUTE, JOIN, EXPERTS))
    return max(0.0, 1.0 - busy / (stages * end))
