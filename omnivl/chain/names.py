"""Names of layers, parameters and buffers: their structure, and their earlier forms in old files.

Parameters are named ``layer.module...``, the layers of a stack ``stack_07``, its last normalisation ``stack_norm``, an
embedding of its own ``stack_embed``. For a given layer use ``ChainLayer.stack`` instead.
"""

import re
from collections.abc import Mapping

_RENAMED: Mapping[str, str] = {"contrast.queue.": "losses.heads.univlc.queue."}
"""Earlier prefixes of names, and their present forms."""

_PLACE_IN_STACK = re.compile(r"_(?:\d+|norm|embed)$")


def current_name(name: str) -> str:
    """The present name of a tensor in a file of any version."""
    for before, now in _RENAMED.items():
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name


def only_trains(name: str) -> bool:
    """Whether only training reads a tensor: one of a momentum twin or a queue."""
    return any(part.startswith("momentum_") or part == "queue" for part in name.split("."))


def stack_of(name: str) -> str:
    """The stack that a layer or one of its parameters belongs to: ``visual`` for ``visual_07.block.norm1.weight``.

    Layers that stand alone have a stack of their own name.
    """
    return _PLACE_IN_STACK.sub("", name.partition(".")[0])
