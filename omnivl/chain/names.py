"""Names of parameters and buffers that were called otherwise once: files of before are read under today's names."""

from collections.abc import Mapping

_RENAMED: Mapping[str, str] = {"contrast.queue.": "losses.heads.univlc.queue."}
"""Beginnings of names, and what stands in their place today."""


def current_name(name: str) -> str:
    """Today's name of a tensor that a file of any time holds."""
    for before, now in _RENAMED.items():
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name
