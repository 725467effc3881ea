"""Reads what the processes of a run have written (``engine.hosts.shards``), whatever their number and layout."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.hosts.shards import INDEX, STATES, read_label, shard_name, state_label
from engine.processes.files import read_whole
from omnivl.chain.names import current_name


class _Run(NamedTuple):
    """A run of a tensor in a file.

    Attributes:
        file: An open one.
        label: The run's key in it.
        start: Where it begins in the flattened tensor.
        length: Its elements.
    """

    file: Any
    label: str
    start: int
    length: int


class SavedTensors:
    """Reads files lazily: a process that finds all it needs in the file of its own machine opens no other.

    Attributes:
        steps: Steps that the optimizer had taken; 0 where there are no moments.
        shapes: Whole shapes of all tensors by their keys, under today's names.
    """

    def __init__(self, folder: Path, *, first: int = 0) -> None:
        """Reads the index.

        Args:
            folder: Written by ``Shard.write`` of all processes.
            first: The process whose file is searched first.

        Raises:
            CheckpointError: There is no index.
        """
        path = folder / INDEX
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; allowed is a folder that a host saved, an index with its shards")
        try:
            index = json.loads(read_whole(path))
            self.steps: int = index["steps"]
            self.shapes: Mapping[str, tuple[int, ...]] = {
                _current_key(key): tuple(shape) for key, shape in index["tensors"].items()
            }
            shards: list[int] | int = index["shards"]
            self._shards = list(range(shards)) if isinstance(shards, int) else shards  # format 2: one of each process
            numbers = dict.fromkeys([*self._shards[first : first + 1], *self._shards])
            self._unread = iter([folder / shard_name(number) for number in numbers])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: got a file that is no index of shards ({error!r}); verify it") from error
        self._folder = folder
        self._found: dict[str, list[_Run]] = {key: [] for key in self.shapes}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """``[count]`` elements of a flattened tensor.

        Raises:
            CheckpointError: The shards do not hold them all, or one of them cannot be read.
        """
        if count == 0:
            return torch.empty(0)
        parts: list[tuple[int, Tensor]] = []
        left = count
        for run in self._runs(key):
            begin, end = max(start, run.start), min(start + count, run.start + run.length)
            if begin < end:
                held = run.file.get_tensor(run.label).view(-1)  # mapped: only what is used is read
                parts.append((begin, held[begin - run.start : end - run.start]))
                left -= end - begin
            if left == 0:
                break
        if left != 0:
            raise CheckpointError(f"the shards hold {count - left} of {count} elements of {key}")
        parts.sort(key=lambda part: part[0])
        return parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts])

    def whole(self, key: str) -> Tensor:
        """A tensor in its own shape.

        Raises:
            CheckpointError: As ``read``.
        """
        shape = self.shapes[key]
        return self.read(key, 0, torch.Size(shape).numel()).view(shape)

    def state(self, process: int) -> dict[str, Any]:
        """What a process kept beside its tensors.

        Raises:
            CheckpointError: Its file does not hold it, or cannot be read.
        """
        path = self._folder / shard_name(self._shards[process])
        try:
            with safe_open(path, framework="pt") as file:
                content = file.get_tensor(state_label(process)).numpy().tobytes()
            state: dict[str, Any] = json.loads(content)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: got a file that is no shard or is truncated ({error})") from error
        return state

    def _runs(self, key: str) -> Iterator[_Run]:
        yield from self._found[key]
        for path in self._unread:
            seen = len(self._found[key])
            self._open(path)
            yield from self._found[key][seen:]

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            starts = json.loads((file.metadata() or {}).get("runs", "{}"))  # in format 2
            for label in file.keys():  # noqa: SIM118 - it is no mapping
                if not label.startswith(STATES):
                    key, start = read_label(label)
                    length = math.prod(file.get_slice(label).get_shape())
                    self._found[_current_key(key)].append(_Run(file, label, starts.get(label, start), length))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: got a file that is no shard or is truncated ({error})") from error


def _current_key(key: str) -> str:
    field, _, name = key.partition("/")
    return f"{field}/{current_name(name)}"
