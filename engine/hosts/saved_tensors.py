"""Reads what the processes of a run have written (``engine.hosts.shards``), whatever their number and layout."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.hosts.shards import INDEX, STATES, Piece, read_label, shard_name, state_label
from engine.processes.files import read_whole
from omnivl.chain.names import current_name


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
        self._found: dict[str, list[Piece]] = {key: [] for key in self.shapes}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """``[count]`` elements of a flattened tensor.

        Raises:
            CheckpointError: The shards do not hold them all, or one of them cannot be read.
        """
        if count == 0:
            return torch.empty(0)
        parts: list[tuple[int, Tensor]] = []
        left = count
        for piece in self._pieces(key):
            begin, end = max(start, piece.start), min(start + count, piece.start + piece.held.numel())
            if begin < end:
                parts.append((begin, piece.held[begin - piece.start : end - piece.start]))
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

    def _pieces(self, key: str) -> Iterator[Piece]:
        yield from self._found[key]
        for path in self._unread:
            seen = len(self._found[key])
            self._open(path)
            yield from self._found[key][seen:]

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                runs = json.loads((file.metadata() or {}).get("runs", "{}"))  # where they began in format 2
                for label in file.keys():  # noqa: SIM118 - it is no mapping
                    if label.startswith(STATES):
                        continue
                    key, start = read_label(label)
                    now = _current_key(key)
                    held = file.get_tensor(label).view(-1)  # mapped: only what is used is read
                    self._found[now].append(Piece(now, self.shapes[now], runs.get(label, start), held))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: got a file that is no shard or is truncated ({error})") from error


def _current_key(key: str) -> str:
    field, _, name = key.partition("/")
    return f"{field}/{current_name(name)}"
