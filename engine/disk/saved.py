"""Checkpoints on disk, without a host or a model: finds and describes them, reads and averages their weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.disk.checkpoint import (
    HOST_FOLDER,
    MANIFEST,
    SavedLayout,
    checkpoint_steps,
    find_fault,
    newest_complete,
    read_manifest,
    read_trainer,
    step_folder,
)
from engine.disk.merging import merged
from engine.disk.weights_file import check_weights, find_damage
from engine.errors import CheckpointError
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.stores import WEIGHT
from omnivl.chain.names import current_name, stack_of
from omnivl.errors import UserError

_TWIN = "momentum_"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        path: Its folder.
        step: Optimizer steps that the stage had taken.
        skipped: Steps among them that were skipped.
        layout: What wrote it.
        optimizer_steps: Steps that the optimizer had taken; 0 where there are no moments.
        bytes: Size of all files.
        parts: Numbers of elements by stack of the model and by type: ``weights`` (with buffers), ``twins``,
            ``moments``.
    """

    path: Path
    step: int
    skipped: int
    layout: SavedLayout
    optimizer_steps: int
    bytes: int
    parts: Mapping[str, Mapping[str, int]]

    def as_json(self) -> dict[str, Any]:
        """Plain containers."""
        return {**asdict(self), "path": str(self.path)}


def find_checkpoint(target: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest whole one of a stage or of a run's last stage.

    Args:
        target: A ``step-...`` folder, a stage's folder or its ``checkpoints``, or a run's folder.

    Raises:
        UserError: There is none, or the one that is named is damaged.
    """
    if (target / MANIFEST).is_file():
        if (fault := find_fault(target)) is not None:
            raise CheckpointError(f"{target}: got a damaged checkpoint: {fault}; name another one, or the whole run")
        return target
    stages = sorted((target / "stages").glob("*-*"), reverse=True)
    folders = [target, target / "checkpoints", *(stage / "checkpoints" for stage in stages)]
    passed: list[str] = []
    for folder in folders:
        if checkpoint_steps(folder) and (found := newest_complete(folder, passed.append)) is not None:
            return found
    why = f" ({'; '.join(passed)})" if passed else ""
    raise UserError(
        f"{target}: got a path without a whole checkpoint{why}; allowed a step-... folder, a stage's folder or a run's "
        "folder, such as runs/quickstart; name one that omnivl pretrain has written"
    )


def find_faults(target: Path) -> dict[Path, str | None]:
    """What is wrong with every checkpoint and every weights file below a path, or with the path itself where it is one.

    Raises:
        UserError: There is none.
    """
    if target.suffix == ".safetensors" and target.is_file():
        return {target: find_damage(target)}
    weights = (target / "weights.safetensors", *sorted(target.glob("stages/*/weights.safetensors")))
    faults = {file: find_damage(file) for file in weights if file.is_file()}
    try:
        return {checkpoint: find_fault(checkpoint) for checkpoint in all_checkpoints(target)} | faults
    except UserError:
        if not faults:
            raise
    return faults


def all_checkpoints(target: Path) -> list[Path]:
    """Every checkpoint below a path, whole or not; the path itself where it is one.

    Raises:
        UserError: There is none.
    """
    if target.name.startswith("step-") and target.is_dir():
        return [target]
    folders = [target, target / "checkpoints", *sorted(target.glob("stages/*/checkpoints"))]
    found = [step_folder(folder, step) for folder in folders for step in checkpoint_steps(folder)]
    if not found:
        raise UserError(
            f"{target}: got a path without a checkpoint; allowed a step-... folder, a stage's or a run's folder"
        )
    return found


def describe(checkpoint: Path) -> Saved:
    """Reads the description of a whole checkpoint; tensors are not read.

    Raises:
        CheckpointError: A file is missing or cannot be read.
    """
    try:
        trainer, files = read_trainer(checkpoint), read_manifest(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: got a checkpoint that cannot be read ({error}); verify it") from error
    tensors = SavedTensors(checkpoint / HOST_FOLDER)
    parts: dict[str, dict[str, int]] = {}
    for name, shape in tensors.shapes.items():
        field, _, tensor = name.partition("/")
        part = parts.setdefault(stack_of(tensor), {"weights": 0, "twins": 0, "moments": 0})
        what = "moments" if field != WEIGHT else "twins" if f".{_TWIN}" in tensor else "weights"
        part[what] += torch.Size(shape).numel()
    size = sum(record["bytes"] for records in files.values() for record in records)
    return Saved(checkpoint, trainer.step, trainer.skipped, trainer.layout, tensors.steps, size, parts)


def saved_weights(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by their names in the chain, adapters merged, one after the other.

    Args:
        source: A checkpoint's folder, or a ``.safetensors`` file of weights.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if source.is_dir():
        saved = SavedTensors(source / HOST_FOLDER)
        names = sorted(key.removeprefix(f"{WEIGHT}/") for key in saved.shapes if key.startswith(f"{WEIGHT}/"))
        yield from merged(((name, saved.whole(f"{WEIGHT}/{name}")) for name in names), names)
        return
    check_weights(source)
    try:
        with safe_open(source, framework="pt") as file:
            for name in sorted(file.keys()):
                yield current_name(name), file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source}: got a file that is no safetensors file or is truncated ({error})") from error


def average_weights(sources: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints, summed in fp64; other tensors than floats are the last one's.

    Args:
        sources: Checkpoints or weight files of one model, two or more.

    Raises:
        CheckpointError: Their names or shapes differ.

    Source: Izmailov et al., arXiv 1803.05407; Wortsman et al., Model soups, arXiv 2203.05482.
    """
    assert len(sources) >= 2, "one checkpoint is its own mean"
    first = dict(saved_weights(sources[0]))
    kinds = {name: tensor.dtype for name, tensor in first.items()}
    sums = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    for source in sources[1:]:
        left = set(sums)
        for name, tensor in saved_weights(source):
            if name not in sums or sums[name].shape != tensor.shape:
                held = list(sums[name].shape) if name in sums else "no such weight"
                raise CheckpointError(
                    f"{source}: {name} has shape {list(tensor.shape)}, {sources[0]} has {held}; allowed are "
                    "checkpoints of one model: leave one of the two out"
                )
            left.discard(name)
            sums[name] = sums[name] + tensor.double() if tensor.is_floating_point() else tensor
        if left:
            raise CheckpointError(f"{source}: {min(left)} is missing, {sources[0]} has it ({len(left)} such weights)")
    return {
        name: (total / len(sources)).to(kinds[name]) if kinds[name].is_floating_point else total
        for name, total in sums.items()
    }
