"""Micro-batches and accumulation that a plan leaves open, worked out from its global batch and the processes."""

import math
from typing import Any, TypeGuard

from engine.plan.limits import limit_of
from engine.plan.parallel import MOST_AUTOMATIC, BatchConfig, ParallelConfig
from moe.ranges import AUTO

_MICRO, _ACCUMULATION, _GLOBAL = "micro_batch_size_per_gpu", "gradient_accumulation_steps", "global_batch_size"


def work_out_batches(tree: dict[str, Any], world_size: int | None) -> None:
    """Replaces ``auto`` in the batches of a plan and of its stages by numbers, in place.

    A number that does not come out even is left to the rule about batches, which names all three.

    Args:
        tree: A plan whose stages have their shared sections.
        world_size: Number of processes; None where it is not known, which counts as the plan's own number, or one.
    """
    launch = tree.get("launch")
    own = launch.get("processes") if isinstance(launch, dict) else None
    processes = world_size or (own if _is_count(own) else 1)
    stages = tree.get("stages")
    for holder in (tree, *(stages if isinstance(stages, list) else [])):
        if isinstance(holder, dict) and isinstance(holder.get("batch"), dict):
            holder["batch"] = _worked_out(holder["batch"], max(1, _replicas(holder.get("parallel"), processes)))


def batch_in_words(micro: int, accumulation: int, replicas: int) -> str:
    """``8,192 = 32 x 4 accumulated x 64``: the samples of a step, of a micro-batch, micro-batches, replicas."""
    return f"{micro * accumulation * replicas:,} = {micro} x {accumulation} accumulated x {replicas}"


def divisors_around(number: int, place: int) -> list[int]:
    """The nearest divisors of a number below and above a place that is none; one where there is no other."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    divisors = sorted({*small, *(number // one for one in small)})
    return [*[one for one in divisors if one < place][-1:], *[one for one in divisors if one > place][:1]]


def _worked_out(batch: dict[str, Any], replicas: int) -> dict[str, Any]:
    """The section with numbers for ``auto``, which a global batch that stands alone means for both others."""
    whole = batch.get(_GLOBAL)
    alone = _is_count(whole) and _MICRO not in batch and _ACCUMULATION not in batch
    micro = AUTO if alone else batch.get(_MICRO, BatchConfig.micro_batch_size_per_gpu)
    accumulation = AUTO if alone else batch.get(_ACCUMULATION, BatchConfig.gradient_accumulation_steps)
    share = max(1, whole // replicas) if _is_count(whole) else None
    if accumulation == AUTO:
        most = MOST_AUTOMATIC if micro == AUTO else micro
        if not _is_count(most) or most > limit_of(_MICRO).high:
            return {**batch, _ACCUMULATION: 1}  # the micro-batch alone is wrong, as the typing tells
        size = most if share is None else _largest_divisor(share, most)
        return {**batch, _MICRO: size, _ACCUMULATION: 1 if share is None else share // size}
    if micro == AUTO:
        steps = accumulation if _is_count(accumulation) else 1
        most = MOST_AUTOMATIC if share is None else max(1, share // steps)
        batch = {**batch, _MICRO: most}
    return batch


def _largest_divisor(number: int, most: int) -> int:
    return next(one for one in range(min(number, most), 0, -1) if number % one == 0)


def _replicas(parallel: Any, processes: int) -> int:
    """Number of replicas, as ``ParallelConfig.replicas`` says, of a section that is not typed yet."""
    section = parallel if isinstance(parallel, dict) else {}
    stages = section.get("pipeline_stages", ParallelConfig.pipeline_stages)
    return processes // stages if section.get("host") == "pipeline" and _is_count(stages) else processes


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
