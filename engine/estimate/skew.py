"""What uneven routing costs under expert parallelism: all wait for the process whose experts get most tokens.

Shapes: E experts of a layer, P processes over which its bank is split, each with E / P experts in a row.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.estimate.banks import BankWork
from engine.estimate.operations import STARTED, Operations, weighted
from engine.estimate.work import ModelWork, Pass
from engine.hosts.zero.experts import expert_banks
from engine.step.freeze import is_unread
from omnivl.chain.chain import Chain
from omnivl.errors import UserError

Loads = Mapping[str, NDArray[np.float64]]
"""Share of a layer's choices that each expert gets, ``[E]``, by the name of the layer in the chain."""

_UNHEARD = ("alignment", "generation")
"""Stacks that encode neither pictures nor texts, so that the task ``routing`` does not hear their routers."""

_ALLOWED = "allowed is the routing.parquet of an evaluation with the task `routing`"


def experts_by_layer(chain: Chain) -> dict[str, int]:
    """The number of experts of each layer that has sparse ones."""
    return {
        name: next(bank.num_experts for _, bank in banks)
        for name, layer in chain.named_layers.items()
        if (banks := list(expert_banks(layer)))
    }


def heard_layers(chain: Chain) -> set[str]:
    """Those of them that every evaluation of the chain's model has tokens of: encoders' that steps read."""
    return {
        name
        for name, layer in chain.named_layers.items()
        if layer.stack not in _UNHEARD
        and any(not is_unread(one) for _, bank in expert_banks(layer) for one in bank.parameters())
    }


def loads_by_stage(path: Path, chains: Mapping[str, Chain]) -> dict[str, Loads]:
    """Loads of the stages of a plan that have sparse experts, by the stage's name.

    Args:
        path: The ``routing.parquet`` of an evaluation.
        chains: Of the stages, by name.

    Raises:
        UserError: It cannot be read or is of another model, or no stage has sparse experts.
    """
    experts = {name: known for name, chain in chains.items() if (known := experts_by_layer(chain))}
    if not experts:
        raise UserError(
            f"--routing: got {path} for stages without sparse experts ({', '.join(chains)}); allowed are stages with "
            "some (model.ffn of kind `limoe` or `mome_limoe`); leave the option out"
        )
    return {name: read_loads(path, known, heard_layers(chains[name])) for name, known in experts.items()}


def read_loads(path: Path, experts: Mapping[str, int], needed: Collection[str] = ()) -> dict[str, NDArray[np.float64]]:
    """Loads from the ``routing.parquet`` of an evaluation: of the choices that an expert served.

    Args:
        path: The file.
        experts: Number of experts by layer.
        needed: Those of the layers that the table must have; others are even where it lacks them.

    Raises:
        UserError: It cannot be read, or is of another model.
    """
    counted = _choices(path)
    found: dict[str, NDArray[np.float64]] = {}
    for (layer, expert), count in counted.items():
        name = str(layer).partition("/")[0]
        if name not in experts or not 0 <= expert < experts[name]:
            known = ", ".join(f"{one} ({number} experts)" for one, number in experts.items())
            raise UserError(
                f"--routing: got {path} with expert {expert} of layer {name!r}; allowed are the routed layers of the "
                f"plan's model ({known}); name the table of a run of this model, or its stage with --stage"
            )
        found.setdefault(name, np.zeros(experts[name]))[expert] += count
    if absent := [name for name in experts if name in needed and name not in found]:
        raise UserError(
            f"--routing: got {path} without choices of {', '.join(absent)}; allowed are tables with all routed layers "
            "that encode pictures or texts; name the table of a run of this model on samples with captions, or the "
            "run's stage with --stage"
        )
    return {name: one / one.sum() for name, one in found.items()}


def _choices(path: Path) -> dict[tuple[str, int], int]:
    """Number of served choices by layer and expert; a choice that finds no place under a capacity reaches no expert."""
    import pandas as pd  # takes half a second

    try:
        table = pd.read_parquet(path, columns=["layer", "expert", "served"])
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:100]
        raise UserError(f"--routing: got {path}, which cannot be read ({said}); {_ALLOWED}; name one") from error
    checks = {
        "expert": ("integers", pd.api.types.is_integer_dtype),
        "served": ("true or false", pd.api.types.is_bool_dtype),
    }
    for column, (wanted, is_so) in checks.items():
        if not is_so(table[column].dtype):
            raise UserError(
                f"--routing: got {path} whose column `{column}` is of type {table[column].dtype}, not {wanted}; "
                f"{_ALLOWED}; name one"
            )
    served = table[table["served"]]
    if served.empty:
        raise UserError(
            f"--routing: got {path} without a choice that an expert served; {_ALLOWED}; name one with tokens"
        )
    counted = served.groupby(["layer", "expert"], observed=True).size()
    return {(str(layer), int(expert)): int(count) for (layer, expert), count in counted.items()}


def heaviest(load: NDArray[np.float64], processes: int) -> float:
    """Tokens of the process that gets most over the mean: 1 if all get as many."""
    return float(load.reshape(processes, -1).sum(axis=1).max() * processes)


def part_of_banks(work: ModelWork, processes: int, loads: Loads | None = None) -> ModelWork:
    """The work of the process whose experts get most tokens, layer by layer, where banks are split.

    It has the weights of its experts alone, and the rows that all processes send there. Others wait for it, as they
    need their rows back before they go on. What banks do not do stays the same.

    Args:
        work: With all experts and even loads.
        processes: P; with 1 nothing changes, as the process has all experts.
        loads: Layers that it does not name are even; None: all are.
    """
    if processes == 1:
        return work
    passes = []
    for one in work.passes:
        if not one.banks.rows:
            passes.append(one)
            continue
        load = (loads or {}).get(one.layer)
        passes.append(_with_part(one, processes, 1.0 if load is None else heaviest(load, processes)))
    return replace(work, passes=tuple(passes))


def _with_part(one: Pass, processes: int, load: float) -> Pass:
    """A pass of a process with its part of the experts, which get ``load`` times the mean of the rows."""
    return replace(
        one,
        forward=_of_part(one.forward, one.banks, processes, load),
        backward=_of_part(one.backward, one.banks_backward, processes, load),
        routed=one.routed * load,
        routed_gradient=one.routed_gradient * load,
    )


def _of_part(operations: Operations, banks: BankWork, processes: int, load: float) -> Operations:
    elsewhere = 1.0 - 1.0 / processes
    started = sum(banks.weights.values())  # as many operations, on fewer weights
    return weighted(
        (operations, 1.0), (banks.rows, load - 1.0), (banks.weights, -elsewhere), ({STARTED: started}, elsewhere)
    )
