"""Names of parameters and buffers: what they tell, and what they were called in files of before."""

from collections.abc import Mapping

_RENAMED: Mapping[str, str] = {"contrast.queue.": "losses.heads.univlc.queue."}
"""Beginnings of names, and what stands in their place today."""


def current_name(name: str) -> str:
    """Today's name of a tensor that a file of any time holds."""
    for before, now in _RENAMED.items():
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name


def only_trains(name: str) -> bool:
    """Whether a tensor is read by training alone: of a momentum twin, or of a queue."""
    return any(part.startswith("momentum_") or part == "queue" for part in name.split("."))
