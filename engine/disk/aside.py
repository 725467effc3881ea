"""Heads that a stage does not have, kept in its weights file for a later stage that has them again."""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from engine.disk.weights_file import WeightsFile
from omnivl.chain.names import only_trains

ASIDE = "aside."
"""Prefix, in a weights file, of the names of heads that the stage itself does not have."""

HEADS = "losses."
"""Prefix of the names of the parameters of heads."""


def heads_aside(own: Collection[str], file: Path) -> dict[str, Tensor]:
    """The heads of an earlier stage that a stage does not have, under their names with the prefix ``ASIDE``.

    Args:
        own: Names of the stage's own weights.
        file: The weights that the stage started from. Only heads are read from it.

    Raises:
        CheckpointError: The file is no safetensors file or truncated.
    """
    stored = WeightsFile(file)
    plain = {name.removeprefix(ASIDE): name for name in stored.names}
    kept = [name for name in plain if is_head(name) and name not in own]
    found = stored.read([plain[name] for name in kept])
    return {ASIDE + name: found[plain[name]] for name in kept}


def is_head(name: str) -> bool:
    """Whether a weight belongs to a head, and is not read by training alone as momentum twins and queues are."""
    return name.startswith(HEADS) and not only_trains(name)
