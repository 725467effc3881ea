"""What uneven routing costs under expert parallelism: all wait for the process whose experts get most tokens.

Shapes: E experts of a layer, P processes over which its bank is split, each with E / P experts in a row.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.estimate.operations import Operations
from engine.estimate.work import ModelWork, Pass
from engine.hosts.zero.experts import expert_banks
from omnivl.chain.chain import Chain
from omnivl.errors import UserError

Loads = Mapping[str, NDArray[np.float64]]
"""Share of a layer's choices that each expert gets, ``[E]``, by the name of the layer in the chain."""

_BACKWARD = 2
"""Operations of the experts' backward pass over those of the forward pass: two products for each."""


def experts_by_layer(chain: Chain) -> dict[str, int]:
    """The number of experts of each layer that has sparse ones."""
    return {
        name: next(bank.num_experts for _, bank in banks)
        for name, layer in chain.named_layers.items()
        if (banks := list(expert_banks(layer)))
    }


def read_loads(path: Path, experts: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """Loads from the ``routing.parquet`` of an evaluation.

    Args:
        path: The file.
        experts: Number of experts by layer.

    Raises:
        UserError: It cannot be read, or is of another model.
    """
    import pandas as pd  # takes half a second

    try:
        table = pd.read_parquet(path, columns=["layer", "expert"])
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:100]
        raise UserError(
            f"--routing: got {path}, which cannot be read ({said}); allowed is the routing.parquet of an evaluation "
            "with the task `routing`; name one"
        ) from error
    counted = table.groupby(["layer", "expert"], observed=True).size()
    found: dict[str, NDArray[np.float64]] = {}
    for (layer, expert), count in counted.items():
        name = str(layer).partition("/")[0]
        if name not in experts or not 0 <= int(expert) < experts[name]:
            known = ", ".join(f"{one} ({number} experts)" for one, number in experts.items()) or "none"
            raise UserError(
                f"--routing: got {path} with expert {expert} of layer {name!r}; allowed are the routed layers of the "
                f"plan's model ({known}); name the table of a run of this model"
            )
        found.setdefault(name, np.zeros(experts[name]))[int(expert)] += count
    return {name: one / one.sum() for name, one in found.items()}


def heaviest(load: NDArray[np.float64], processes: int) -> float:
    """Tokens of the process that gets most over the mean: 1 if all get as many."""
    return float(load.reshape(processes, -1).sum(axis=1).max() * processes)


def skewed(work: ModelWork, loads: Loads, processes: int) -> ModelWork:
    """The work of the process whose experts get most tokens, layer by layer.

    Others wait for it, as they need its rows back before they go on. What is no product of an expert stays the same.

    Args:
        work: With even loads.
        loads: Layers that it does not name are even.
        processes: P; with 1 nothing changes, as the process has all experts.
    """
    if processes == 1:
        return work
    passes = []
    for one in work.passes:
        factor = heaviest(loads[one.layer], processes) if one.layer in loads else 1.0
        passes.append(one if factor == 1.0 else _heavier(one, factor - 1))
    return replace(work, passes=tuple(passes))


def _heavier(one: Pass, more: float) -> Pass:
    return replace(
        one,
        forward=_sum(one.forward, one.experts, more),
        backward=_sum(one.backward, one.experts, _BACKWARD * more),
        routed=one.routed * (1 + more),
        routed_gradient=one.routed_gradient * (1 + more),
    )


def _sum(operations: Operations, further: Operations, times: float) -> Operations:
    total = dict(operations)
    for operation, count in further.items():
        total[operation] = total.get(operation, 0.0) + times * count
    return total
