"""Paths as people write them: ``~`` and ``$VARIABLES`` expanded, wherever a plan names a file or a folder."""

import os
from typing import Any

_FIELDS = ("source", "tokenizer", "preset", "answers", "teacher", "index_cache", "nvme_folder", "pipeline_profile")
"""Fields whose text is a path, in whatever section they stand. Those of ``weights`` are paths as well."""


def expanded(path: str) -> str:
    """A path with its home folder and variables written out.

    Addresses and commands stay as they are: a plan of somebody else may not send variables of ours over a network.
    """
    if "://" in path or path.startswith("pipe:"):
        return path
    return os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 - leaves what it does not know; Path.expanduser raises


def expand_paths(tree: Any) -> None:
    """Expands the paths of a plan's tree in place."""
    if isinstance(tree, list):
        for member in tree:
            expand_paths(member)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            if name in _FIELDS and isinstance(value, str):
                tree[name] = expanded(value)
            elif name == "weights" and isinstance(value, dict):
                tree[name] = {part: expanded(one) if isinstance(one, str) else one for part, one in value.items()}
            else:
                expand_paths(value)
