"""Names of layers, parameters and buffers: what they tell, and what they were called in files of before.

Parameters are named ``layer.module...``, the layers of a stack ``stack_07``, its last normalisation ``stack_norm``. Who
has the layer at hand asks it (``ChainLayer.stack``).
"""

import re
from collections.abc import Mapping

_RENAMED: Mapping[str, str] = {"contrast.queue.": "losses.heads.univlc.queue."}
"""Beginnings of names, and what stands in their place today."""

_PLACE_IN_STACK = re.compile(r"_(?:\d+|norm)$")


def current_name(name: str) -> str:
    """Today's name of a tensor that a file of any time holds."""
    for before, now in _RENAMED.items():
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name


def only_trains(name: str) -> bool:
    """Whether a tensor is read by training alone: of a momentum twin, or of a queue."""
    return any(part.startswith("momentum_") or part == "queue" for part in name.split("."))


def stack_of(name: str) -> str:
    """The stack that a layer or one of its parameters belongs to: ``visual`` for ``visual_07.block.norm1.weight``.

    Layers that stand alone have a stack of their own name.
    """
    return _PLACE_IN_STACK.sub("", name.partition(".")[0])
