"""The data type that a stage computes in if its plan says ``precision: auto``."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from engine.plan.parallel import ParallelConfig, Precision
from engine.plan.plan import Plan
from engine.processes import ranks
from engine.telemetry.peak import measured_peak

_SECONDS = 0.1
"""Length of each measurement. It may be short: a CPU is about five times slower or faster at bf16 than at fp32."""


def compute_dtype(parallel: ParallelConfig, device: torch.device) -> torch.dtype:
    """The data type of activations and products. Called by every process where the plan says ``auto``."""
    return dtype_of(faster_precision(device) if parallel.precision == "auto" else parallel.precision)


def dtype_of(precision: Precision) -> torch.dtype:
    """The data type by its name in a plan.

    Raises:
        ValueError: ``auto``, which has to be resolved on a machine first.
    """
    if precision == "auto":
        raise ValueError("precision: got 'auto'; allowed are 'fp32' and 'bf16'; replace it by with_precision first")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def faster_precision(device: torch.device) -> Precision:
    """The type that ``auto`` chooses: bf16 unless rank 0's device multiplies fp32 faster. Called by every process."""
    bf16, fp32 = (measured_peak(device, dtype, _SECONDS) for dtype in (torch.bfloat16, torch.float32))
    return ranks.from_first("bf16" if bf16 >= fp32 else "fp32", Precision)


def with_precision(plan: Plan, default: Precision, stages: Mapping[str, Precision] | None = None) -> Plan:
    """The plan with every ``auto`` replaced.

    Args:
        plan: Any.
        default: What ``auto`` becomes.
        stages: By the names of stages, the precision that it becomes there instead.
    """

    def replaced(parallel: ParallelConfig, precision: Precision) -> ParallelConfig:
        return replace(parallel, precision=precision) if parallel.precision == "auto" else parallel

    known = stages or {}
    return replace(
        plan,
        parallel=replaced(plan.parallel, default),
        stages=tuple(
            replace(stage, parallel=replaced(stage.parallel, known.get(stage.name, default))) for stage in plan.stages
        ),
    )
