"""What training a stage takes as a whole: hours, samples, epochs of its data, and money."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.estimate.report import StageEstimate
from engine.plan.epochs import passes


@dataclass(frozen=True)
class Training:
    """All steps of one or several stages, without evaluation, checkpoints and failures.

    Attributes:
        hours: From the first step to the last.
        gpu_hours: Hours times processes.
        samples: Samples that are seen.
        epochs: Passes over each data entry, by stage and entry; None where its samples cannot be counted here.
        cost: Of the GPU-hours; None without a price.
    """

    hours: float
    gpu_hours: float
    samples: int
    epochs: dict[str, dict[str, float | None]]
    cost: float | None


def training_of(
    figures: Sequence[StageEstimate],
    *,
    index_cache: str | None = None,
    price: float | None = None,
    samples: int | None = None,
) -> Training:
    """The whole training of some stages, one after the other.

    Args:
        figures: Their estimates, on one cluster.
        index_cache: The loader's.
        price: Of a GPU-hour.
        samples: Of each stage's first data entry, where that is not on this machine.
    """
    hours = sum(one.stage.steps * one.seconds for one in figures) / 3600
    gpu_hours = hours * figures[0].cluster.processes
    return Training(
        hours,
        gpu_hours,
        sum(one.stage.steps * one.samples for one in figures),
        {one.stage.name: passes(one.stage, index_cache, one.stage.steps * one.samples, samples) for one in figures},
        None if price is None else price * gpu_hours,
    )
