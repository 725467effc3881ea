"""Steps of stages that say how many epochs they train, worked out from their data and their global batch.

An epoch is one pass over the stage's first data entry that has a weight above 0: every sample that its kind and
``where`` leave. Micro-batches are drawn from the entries by their weights, so that with n samples, a share w of the
mixture and b samples in a step, ``epochs`` are ``epochs * n / (b * w)`` steps, rounded up.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from engine.plan.limits import LARGEST
from engine.plan.plan import Plan, StagePlan
from engine.plan.yaml import Problem
from omnivl.data.config import DataEntryConfig, LoaderConfig, entry_keys
from omnivl.data.sources import is_stream, open_source
from omnivl.errors import DataError

_PLACE_HOLDER = 1


@dataclass(frozen=True)
class Epoch:
    """One pass over the data of a stage.

    Attributes:
        entry: Name of the data entry that is counted.
        samples: Its samples.
        share: Its share of the stage's micro-batches, from 0 to 1.
    """

    entry: str
    samples: int
    share: float

    def steps(self, epochs: float, samples_per_step: int) -> int:
        """Optimizer steps of that many passes, rounded up, at least 1."""
        exact = epochs * self.samples / (samples_per_step * self.share)
        return max(1, math.ceil(exact * (1 - 1e-12)))


def hold_places(tree: Mapping[str, Any]) -> Iterator[Problem]:
    """Gives the stages of a tree that have ``epochs`` and no ``steps`` a number of steps until they are worked out.

    Args:
        tree: A plan; its stages are changed in place.

    Returns:
        Stages that have both.
    """
    stages = tree.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or stage.get("epochs") is None:
            continue
        if stage.get("steps") is None:
            stage["steps"] = _PLACE_HOLDER
        else:
            got = f"{stage['epochs']} beside steps, {stage['steps']}"
            yield Problem(("stages", index, "epochs"), got, "one of the two", "take one out, or set it to null")


def work_out_steps(plan: Plan, world_size: int | None) -> tuple[Plan, list[Problem]]:
    """The plan with the steps of every stage that gives ``epochs``, and what cannot be counted.

    Args:
        plan: Without mistakes.
        world_size: Number of processes; None takes the plan's, and 1 where that is ``auto``.
    """
    launched = plan.launch.processes
    processes = world_size or (1 if launched == "auto" else launched)
    stages, problems = list(plan.stages), []
    for index, stage in enumerate(plan.stages):
        if stage.epochs is None:
            continue
        got = f"{stage.epochs:g}"
        try:
            steps = epoch_of(stage, plan.loader).steps(stage.epochs, stage.samples_per_step(processes))
        except DataError as error:
            got, change = f"{got} of data that has no known number of samples ({error})", "give steps instead"
            problems.append(Problem(("stages", index, "epochs"), got, "samples that can be counted", change))
            continue
        if steps > LARGEST:
            got = f"{got}, which are {steps:,} steps"
            problems.append(Problem(("stages", index, "epochs"), got, f"{LARGEST:,} steps or fewer", "give fewer"))
        stages[index] = replace(stage, steps=steps)
    return replace(plan, stages=tuple(stages)), problems


def with_steps(plan: Plan, steps: Mapping[str, int]) -> Plan:
    """The plan with other steps for the named stages."""
    stages = tuple(replace(one, steps=steps.get(one.name, one.steps)) for one in plan.stages)
    return replace(plan, stages=stages)


def epoch_of(stage: StagePlan, loader: LoaderConfig) -> Epoch:
    """One pass over the stage's first data entry with a weight. Opens its source; no sample is decoded.

    Raises:
        DataError: The source is not there, is empty, or is a stream.
    """
    place, entry = next((place, entry) for place, entry in enumerate(stage.data) if entry.weight > 0)
    key = entry_keys(stage.data)[place]
    if is_stream(entry.source):
        raise DataError(f"data entry {key!r}: a stream is read from front to back")
    share = entry.weight / sum(one.weight for one in stage.data)
    return Epoch(key, _count(_Hashed(entry), loader.index_cache), share)


def passes(
    stage: StagePlan, index_cache: str | None, samples: int, first: int | None = None
) -> dict[str, float | None]:
    """How often a stage sees the samples of each of its data entries with a weight.

    Args:
        stage: Its mixture.
        index_cache: The loader's.
        samples: Samples that the stage takes in all.
        first: Samples of the first entry, where it is not on this machine; counted if not given.

    Returns:
        By entry; None for those that are not on this machine, and for streams.
    """
    total = sum(entry.weight for entry in stage.data)
    found: dict[str, float | None] = {}
    for key, entry in zip(entry_keys(stage.data), stage.data, strict=True):
        if entry.weight == 0:
            continue
        try:
            given = first if not found else None
            count = given or (None if is_stream(entry.source) else _count(_Hashed(entry), index_cache))
        except DataError:
            count = None
        found[key] = None if count is None else samples * entry.weight / total / count
    return found


def described(stage: StagePlan, loader: LoaderConfig, samples_per_step: int) -> str:
    """How the steps of a stage with ``epochs`` came about."""
    assert stage.epochs is not None, "a stage that gives epochs"
    epoch = epoch_of(stage, loader)
    shared = "" if epoch.share == 1 else f", {epoch.share:.0%} of the mixture"
    return (
        f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'} of {epoch.entry} ({epoch.samples:,} samples"
        f"{shared}): {stage.steps:,} steps of {samples_per_step:,}"
    )


@dataclass(frozen=True)
class _Hashed:
    """An entry as a key of a cache: two with equal fields are the same."""

    entry: DataEntryConfig

    def __hash__(self) -> int:
        return hash(json.dumps(asdict(self.entry), sort_keys=True))


@cache
def _count(hashed: _Hashed, index_cache: str | None) -> int:
    return len(open_source(hashed.entry, seed=0, index_cache=index_cache))
