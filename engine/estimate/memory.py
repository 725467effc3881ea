"""Bytes of one process by cause, as the hosts hold them: fp32 parameters, gradients and moments throughout.

Letters: T trained parameters of the layers that the process trains, E of them in banks of experts, N replicas, P
processes of an expert-parallel group; L = T - E + E / P, what a process holds of them where they are not sharded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.estimate.work import LayerSize, ModelWork
from engine.hosts.pipeline.division import Division
from engine.hosts.zero.sizes import BUFFERS
from engine.plan.plan import StagePlan
from engine.step.muon import STEP_COPIES, moved_together

FLATTENED = 500_000_000  # elements that DeepSpeed flattens at once under stage 0


@dataclass(frozen=True)
class Memory:
    """Bytes of a process. Not everything is there at once: ``peak`` is the most.

    Attributes:
        weights: Parameters that are no twins, and the copies of them that the optimizer updates.
        gradients: When the backward pass ends.
        moments: The optimizer's: two of what AdamW moves, one of what Muon moves.
        twins: Momentum twins.
        activations: The most that forward and backward pass need beside parameters and gradients.
        buffers: For communication: buckets, layers that are gathered, the flat copy of gradients.
        queue: The momentum queue and other buffers of the model.
        host: Offloaded to the host's memory or to files.
        peak: The most at once on the device.
        moment: When the peak occurs: ``backward`` or ``optimizer``.
    """

    weights: float
    gradients: float
    moments: float
    twins: float
    activations: float
    buffers: float
    queue: float
    host: float
    peak: float
    moment: str

    @property
    def causes(self) -> Mapping[str, float]:
        """Bytes on the device by cause."""
        names = ("weights", "gradients", "moments", "twins", "activations", "buffers", "queue")
        return {name: getattr(self, name) for name in names}


def process_memory(
    stage: StagePlan,
    work: ModelWork,
    *,
    replicas: int,
    expert_parallel: int,
    division: Division | None = None,
    number: int = 0,
) -> Memory:
    """Of one process.

    Args:
        stage: Host, ZeRO stage, accumulation.
        work: The stage's model.
        replicas: N.
        expert_parallel: P.
        division: The pipeline's; None without one.
        number: Of this process' stage in it.
    """
    sizes = [work.layers[name] for name in (work.layers if division is None else division.owned(number))]
    copies = [work.layers[name] for name in (() if division is None else division.copied(number))]
    copied = sum(_local(size, expert_parallel) for size in copies)
    zero = stage.parallel.zero_stage if stage.parallel.host != "plain" else None
    trained = sum(size.trained for size in sizes)
    local = sum(_local(size, expert_parallel) for size in sizes)
    resting = sum(size.frozen - size.halved / 2 for size in (*sizes, *copies))
    twins = sum(size.twins - size.resting_experts * (1 - 1 / expert_parallel) for size in (*sizes, *copies))
    shard = trained / replicas
    sharded = (zero or 0) > 0
    weights = 4 * (shard + resting / replicas) if zero == 3 else 4 * (local + copied + resting + shard * sharded)
    matrices = [one for size in sizes for one in size.matrices]
    moved = sum(one.elements / replicas if sharded else one.held(expert_parallel) for one in matrices)
    moments = 8 * (shard if sharded else local) - 4 * moved
    # Whole matrices and runs of them on their way; where nothing is sharded, of some parameters after the others.
    largest = max((one.held(expert_parallel) for one in matrices), default=0.0)
    together = moved if sharded else min(moved, max(largest, moved_together(replicas)))
    stepping = 4 * (STEP_COPIES - (replicas == 1)) * together
    gradients = 4 * (shard if (zero or 0) >= 2 else local + copied)
    offload = stage.parallel.offloading
    lasting, passing, moving = _buffers(zero, work, sizes, local, shard, replicas, offloads=offload.optimizer)
    held = 1 if division is None else min(len(division.cuts) - number, stage.batch.gradient_accumulation_steps)
    alone, first = _activations(work, None if division is None else division.cuts[number], held, local + copied)
    twins_bytes = 4 * twins / (replicas if zero == 3 else 1)
    queue = float(sum(size.queue for size in (*sizes, *copies)))
    once = stage.batch.gradient_accumulation_steps == 1 and (zero or 0) < 2
    backward = (first if once else alone + gradients) + passing
    optimizer = gradients + moving + stepping
    host = 0.0
    if offload.optimizer:
        host = moments + 4 * shard + gradients
        weights, moments = weights - (4 * shard if zero != 3 else 0.0), 0.0
        backward, optimizer, gradients = alone + passing, max(passing, stepping), 0.0
    if offload.parameters:
        host, weights = host + weights, 0.0
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        twins=twins_bytes,
        activations=alone,
        buffers=lasting + max(passing, moving),
        queue=queue,
        host=host,
        peak=weights + moments + twins_bytes + queue + lasting + max(backward, optimizer),
        moment="backward" if backward >= optimizer else "optimizer",
    )


def _local(size: LayerSize, expert_parallel: int) -> float:
    return size.trained - size.experts * (1 - 1 / expert_parallel)


def _buffers(
    zero: int | None,
    work: ModelWork,
    sizes: Sequence[LayerSize],
    local: float,
    shard: float,
    replicas: int,
    *,
    offloads: bool,
) -> tuple[float, float, float]:
    """Bytes that are always allocated, those of the backward pass, and those of the optimizer's step."""
    bucket = 4.0 * min(local, work.zero.bucket)
    if zero is None:
        return (4.0 * local if replicas > 1 else 0.0), 0.0, 0.0
    if zero == 0:
        return 0.0, 0.0, 4.0 * min(local, FLATTENED) if replicas > 1 else 0.0
    if zero == 1 and replicas > 1 and not offloads:
        # At the end of a step gradients go through one bucket into a flat tensor, from which the optimizer reads them.
        return 0.0, 0.0, max(bucket, 4.0 * local / BUFFERS) + 4.0 * shard
    if zero < 3:
        # The optimizer reads gradients from one flat tensor, which stage 1 allocates when it needs it.
        return 0.0, bucket, 4.0 * shard if zero == 1 else 0.0
    # ZeRO-3 holds a number of whole layers. Gradients stay whole until they fill a bucket; the bucket is then copied
    # and reduce-scattered, which gives a share.
    whole = min(work.zero.live, sum(size.elements for size in sizes))
    return 0.0, 4.0 * whole + (2 + 1 / replicas) * bucket, 4.0 * min(shard, work.zero.bucket)


def stay_gathered(sizes: Sequence[LayerSize], reuse: int) -> list[bool]:
    """Which layers ZeRO-3 keeps whole from forward to backward pass: no more than ``reuse`` elements lie between.

    Source: ``deepspeed/runtime/zero/partitioned_param_coordinator.py``, ``__params_to_release``.
    """
    behind = 0
    stays = []
    for size in reversed(sizes):
        stays.append(2 * behind < reuse)
        behind += size.elements
    return stays[::-1]


def _activations(work: ModelWork, part: range | None, held: int, local: float) -> tuple[float, float]:
    """The peak without gradients, and the peak with the gradients that a micro-batch adds.

    Args:
        work: The stage's model.
        part: The passes of a pipeline stage; None without one.
        held: Micro-batches whose activations it holds at once.
        local: Elements for which the process has gradients.
    """
    if part is None:
        return max(float(one.alone) for one in work.peaks), max(float(one.with_gradients) for one in work.peaks)
    kept = sum(work.passes[place].activations for place in part)
    passing = max(one.alone - one.forward for one in work.peaks)
    return float(held * kept + passing), held * kept + passing + 4 * local
