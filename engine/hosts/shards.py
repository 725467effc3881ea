"""A host's tensors on disk: every process writes what it holds, any process reads the parts that it needs.

    host/index.json                 {"steps": 1200, "shards": 4, "tensors": {"weight/embed.kinds": [2, 512], ...}}
    host/shard-00000.safetensors    runs of flattened tensors: weight/embed.kinds, exp_avg/embed.kinds ...
    host/shard-00001.safetensors
    ...

A tensor that one shard holds whole keeps its shape. Of other tensors a shard holds a one-dimensional run, and the
file's metadata say where the run begins (``runs``, JSON). The runs of all shards cover every tensor exactly once,
whatever number of processes wrote them and whatever each of them held.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.processes.files import FileRecord, read_whole, write_synced
from omnivl.chain.names import current_name

INDEX = "index.json"
_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
"""Names of types in safetensors."""
_BLOCK = 1 << 28
"""Bytes of one block of reserved memory: page-locked memory comes in powers of two, so that others waste some."""


@dataclass(frozen=True)
class Piece:
    """A run of a tensor.

    Attributes:
        key: ``field/name``.
        shape: Of the whole tensor.
        start: Where the run begins in the flattened tensor.
        held: [n], its elements.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    held: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether the run is the whole tensor."""
        return self.held.numel() == torch.Size(self.shape).numel()

    def part(self, begin: int, end: int) -> "Piece":
        """The elements from ``begin`` to ``end`` of the run."""
        return replace(self, start=self.start + begin, held=self.held[begin:end])


class KeptMemory:
    """Host memory into which all snapshots are copied, one after the other; page-locked for those of a GPU."""

    def __init__(self) -> None:
        """Allocates nothing yet."""
        self._sizes: list[int] = []
        self._views: list[Tensor] = []

    def take(self, sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
        """Bytes for tensors of these sizes, the same as the last time where the sizes are the same.

        Args:
            sizes: Of the tensors in bytes, those of wider types first.
            pinned: Whether the memory is to be page-locked.
        """
        if list(sizes) != self._sizes:
            self._views = []  # before the new ones are allocated
            self._views, self._sizes = _allocate(sizes, pinned), list(sizes)
        return self._views


@dataclass(frozen=True)
class Shard:
    """The file that one process writes.

    Attributes:
        number: Index of the shard.
        pieces: Its runs, those of wider types first.
        index: Content of ``index.json``; None for shards other than the one that writes it.
    """

    number: int
    pieces: Sequence[Piece]
    index: Mapping[str, Any] | None

    def kept(self, memory: KeptMemory) -> "Shard":
        """A copy of the shard, which later changes of the tensors do not affect."""
        on_gpu = any(piece.held.is_cuda for piece in self.pieces)
        places = memory.take([piece.held.nbytes for piece in self.pieces], pinned=on_gpu)
        copies = [place.view(piece.held.dtype) for place, piece in zip(places, self.pieces, strict=True)]
        for copy, piece in zip(copies, self.pieces, strict=True):
            copy.copy_(piece.held, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return replace(
            self, pieces=[replace(piece, held=copy) for piece, copy in zip(self.pieces, copies, strict=True)]
        )

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Writes the shard, and the index if it has one; returns the manifest's entries for both.

        Raises:
            OSError: A file could not be written.
        """
        name = f"shard-{self.number:05d}.safetensors"
        records = {name: write_synced(folder / name, self._contents())}
        if self.index is not None:
            records[INDEX] = write_synced(folder / INDEX, [json.dumps(self.index).encode()])
        return records

    def _contents(self) -> Iterator[bytes | memoryview]:
        """Length of the header, header, data; pieces are copied from their device one after the other."""
        runs = {piece.key: piece.start for piece in self.pieces if not piece.is_whole}
        header: dict[str, Any] = {"__metadata__": {"runs": json.dumps(runs)}}
        end = 0
        for piece in self.pieces:
            begin, end = end, end + piece.held.nbytes
            shape = piece.shape if piece.is_whole else piece.held.shape
            header[piece.key] = {"dtype": _TYPES[piece.held.dtype], "shape": [*shape], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little")
        yield text
        for piece in self.pieces:
            yield piece.held.cpu().view(torch.uint8).numpy().data


def make_shard(number: int, pieces: Iterable[Piece], index: Mapping[str, Any] | None) -> Shard:
    """A shard of pieces in any order; empty ones are left out."""
    filled = [piece for piece in pieces if piece.held.numel() > 0]
    return Shard(number, sorted(filled, key=lambda piece: -piece.held.itemsize), index)


def share(pieces: Sequence[Piece], copy: int, copies: int) -> Iterator[Piece]:
    """One of ``copies`` equal shares of pieces that ``copies`` processes hold: a run of their concatenation."""
    total = sum(piece.held.numel() for piece in pieces)
    first, last = total * copy // copies, total * (copy + 1) // copies
    begin = 0
    for piece in pieces:
        count = piece.held.numel()
        yield piece.part(min(max(first - begin, 0), count), min(max(last - begin, 0), count))
        begin += count


class SavedTensors:
    """Reads shards lazily: a process that reads only from its own shard opens no other.

    Attributes:
        steps: Steps that the optimizer had taken; 0 where there are no moments.
        shapes: Whole shapes of all tensors by their keys, under today's names.
    """

    def __init__(self, folder: Path, *, first: int = 0) -> None:
        """Reads the index.

        Args:
            folder: Written by ``Shard.write`` of all processes.
            first: The shard that is searched first.

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
            numbers = sorted(range(index["shards"]), key=lambda number: number != first)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: got a file that is no index of shards ({error!r}); verify it") from error
        self._unread = iter([folder / f"shard-{number:05d}.safetensors" for number in numbers])
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

    def _pieces(self, key: str) -> Iterator[Piece]:
        yield from self._found[key]
        for path in self._unread:
            seen = len(self._found[key])
            self._open(path)
            yield from self._found[key][seen:]

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                runs: dict[str, int] = json.loads(file.metadata()["runs"])
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    held = file.get_tensor(key).view(-1)  # mapped: only what is used is read
                    now = _current_key(key)
                    self._found[now].append(Piece(now, self.shapes[now], runs.get(key, 0), held))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: got a file that is no shard or is truncated ({error})") from error


def _current_key(key: str) -> str:
    field, _, name = key.partition("/")
    return f"{field}/{current_name(name)}"


def _allocate(sizes: Sequence[int], pinned: bool) -> list[Tensor]:
    views: list[Tensor] = []
    left = 0
    for number, size in enumerate(sizes):
        if size > left:
            rest = sum(sizes[number:])
            block = torch.empty(max(size, min(rest, _BLOCK)), dtype=torch.uint8, pin_memory=pinned)
            left = len(block)
        views.append(block[len(block) - left :][:size])
        left -= size
    return views
