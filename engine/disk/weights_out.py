"""Writes the whole weights of a stage, adapters merged, which later stages and exports start from."""

from collections.abc import Callable
from pathlib import Path

from engine.disk.aside import heads_aside
from engine.disk.merging import merged, merged_kinds
from engine.disk.weights_file import WeightsWriter
from engine.errors import CheckpointError
from engine.hosts import Host
from engine.processes import ranks
from engine.processes.files import sync_folder
from omnivl.errors import reason_of


def write_weights(host: Host, path: Path, source: Path | None) -> None:
    """Writes a safetensors file, one tensor after the other, so that no process ever holds the whole weights.

    Called by every process. The file is written beside and renamed.

    Args:
        host: Holds the weights.
        path: The file; process 0 writes it.
        source: The weights file that the stage started from, if any. Heads that it has and this stage does not
            have are copied under other names, for a later stage.

    Raises:
        CheckpointError: The file cannot be written; on every process.
    """
    held, beside = host.announced_weights(), path.with_suffix(".tmp")
    announced = merged_kinds(held)
    writers: list[WeightsWriter] = []  # one, on process 0
    problem: OSError | None = None

    def begin() -> None:
        aside = {} if source is None else heads_aside(announced.keys(), source)
        extra = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in aside.items()}
        writers.append(WeightsWriter(beside, {**announced, **extra}))
        for name, tensor in aside.items():
            writers[0].write(name, tensor)

    def end() -> None:
        if problem is not None:
            raise problem
        writers[0].finish()
        beside.rename(path)
        sync_folder(path.parent)

    ranks.on_first(lambda: _clearly(begin, path))
    for name, tensor in merged(host.each_weight(), held):
        try:
            writers[0].write(name, tensor)
        except OSError as error:  # not raised yet: the other processes wait for this one in the collectives of the loop
            problem = error
    ranks.on_first(lambda: _clearly(end, path))


def _clearly(action: Callable[[], None], path: Path) -> None:
    try:
        action()
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({reason_of(error)}); make room, and start again"
        ) from error
