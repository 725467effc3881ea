"""Merges low-rank adapters into the weights beside which they stand, as tensors pass one by one.

What a stage hands on, exports or evaluates has no adapters: only its checkpoints have, for its own resumption. A map's
adapter is called ``MAP.adapter.down``, ``.up`` and ``.scale``, its weight ``MAP.weight``.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from engine.errors import CheckpointError
from moe.linear import merged_weight

_ADAPTER = re.compile(r"(?P<map>.+)\.adapter\.(?P<part>down|up|scale)")
_PARTS = ("weight", "down", "up", "scale")

Kind = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


def merged_kinds(announced: Mapping[str, Kind]) -> dict[str, Kind]:
    """What ``merged`` gives of tensors of these types and shapes, by name.

    A weight with an adapter becomes fp32, also where it is kept in bf16: that would round away what was trained.
    """
    maps = _maps(announced)
    return {
        name: (torch.float32, shape) if _place(name, maps)[0] is not None else (dtype, shape)
        for name, (dtype, shape) in announced.items()
        if _ADAPTER.fullmatch(name) is None
    }


def merged(tensors: Iterable[tuple[str, Tensor]], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors without adapters; it holds the parts of a map until it has them all.

    Args:
        tensors: With their names, in any order.
        names: Of all of them.

    Raises:
        CheckpointError: An adapter or its weight is not whole.
    """
    maps = _maps(names)
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        place, part = _place(name, maps)
        if place is None:
            yield name, tensor
            continue
        parts = held.setdefault(place, {})
        parts[part] = tensor
        if len(parts) == len(_PARTS):
            yield f"{place}.weight", merged_weight(**held.pop(place))
    for place, parts in held.items():
        lacking = ", ".join(part for part in _PARTS if part not in parts)
        raise CheckpointError(f"{place}: got an adapter without its {lacking}; allowed are whole ones; save it anew")


def _maps(names: Iterable[str]) -> frozenset[str]:
    """The maps that have an adapter."""
    return frozenset(match["map"] for match in map(_ADAPTER.fullmatch, names) if match is not None)


def _place(name: str, maps: Collection[str]) -> tuple[str | None, str]:
    """The map with an adapter to which a tensor belongs and what it is there; None for other tensors."""
    if (match := _ADAPTER.fullmatch(name)) is not None:
        return match["map"], match["part"]
    place, _, part = name.rpartition(".")
    return (place, part) if part == "weight" and place in maps else (None, "")
