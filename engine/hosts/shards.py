"""A host's tensors on disk: every process writes what it holds, the processes of one machine into one file.

    host/index.json                 {"steps": 1200, "shards": [0, 0, 1, 1], "tensors": {"weight/embed.kinds": [2, 512]}}
    host/shard-00000.safetensors    of processes 0 and 1
    host/shard-00001.safetensors    of processes 2 and 3, which run on another machine

Each file is a safetensors file: the length of its header, the header, the data. Header and data consist of ranges, one
of each process in their order, so that every process can write its own without knowing more of the others than their
sizes. The file holds under these keys

    weight/embed.kinds              a tensor that one process holds whole, in its shape
    weight/embed.table[512:1024]    elements 512 to 1023 of a flattened tensor
    process/00001                   what process 1 keeps beside its tensors: JSON in bytes

The runs of all processes cover every tensor exactly once, whatever number of processes wrote them and whatever each of
them held. ``engine.hosts.saved_tensors`` reads them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.hosts.shared_file import LENGTH, Part, Place, place_among
from engine.processes import ranks
from engine.processes.files import FileRecord, write_ranges, write_synced
from engine.processes.machine import machine

INDEX = "index.json"
_TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
"""Names of types in safetensors."""
_BLOCK = 1 << 28
"""Bytes of one block of reserved memory: page-locked memory comes in powers of two, so that others waste some."""
_FAR = 10**13
"""An offset with at least as many digits as any that is written."""
STATES = "process/"
"""Begins the keys of what is no tensor of the host."""

Records = Mapping[str, Sequence[FileRecord]]
"""What a process has written, by file: its ranges in their order."""


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
        return self.held.numel() == math.prod(self.shape)

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
    """What one process writes.

    Attributes:
        number: Of the process.
        pieces: Its runs, those of wider types first.
        index: Content of ``index.json`` but for the files; None for processes other than the one that writes it.
        state: What it keeps beside its tensors, JSON.
    """

    number: int
    pieces: Sequence[Piece]
    index: Mapping[str, Any] | None
    state: bytes = b"{}"

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

    def placed(self) -> Place:
        """Where it is written. Called by every process of the run: they tell each other their sizes."""
        assert self.number == ranks.rank(), "a host spans all processes of the run"
        return place_among(ranks.gather(self.part(machine()), Part), self.number)

    def part(self, on: str) -> Part:
        """Its sizes, on the machine of that name."""
        head = len(self._entries(_FAR)) + len("{}")
        return Part(on, head + -head % LENGTH, sum(piece.held.nbytes for piece in self.pieces) + len(self._state()))

    def write(self, folder: Path, place: Place) -> Records:
        """Writes the process' part of its file, and the index if it has one. No communication.

        Raises:
            OSError: A file could not be written.
        """
        name = shard_name(place.shard)
        ranges = [(0 if place.is_first else place.head, self._head(place)), (place.data, self._data())]
        records = {name: write_ranges(folder / name, ranges, place.end if place.is_first else None)}
        if self.index is not None:
            index = {**self.index, "shards": place.shards}
            records[INDEX] = [write_synced(folder / INDEX, [json.dumps(index).encode()])]
        return records

    def _head(self, place: Place) -> Iterator[bytes]:
        if place.is_first:
            yield (place.header_end - LENGTH).to_bytes(LENGTH, "little")
        text = b"%b%b%b" % (
            b"{" if place.is_first else b",",
            self._entries(place.data - place.header_end),
            b"}" if place.is_last else b"",
        )
        size = self.part("").head
        assert len(text) <= size
        yield text.ljust(size)

    def _entries(self, end: int) -> bytes:
        """Its entries in the header, if its data begin at that byte of all data."""
        entries: dict[str, Any] = {}
        for piece in self.pieces:
            begin, end = end, end + piece.held.nbytes
            label, shape = piece.key, piece.shape
            if not piece.is_whole:
                shape = (count := piece.held.numel(),)
                label = f"{piece.key}[{piece.start}:{piece.start + count}]"  # which ``read_label`` reads
            entries[label] = {"dtype": _TYPES[piece.held.dtype], "shape": shape, "data_offsets": (begin, end)}
        size = len(self._state())
        entries[state_label(self.number)] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        return json.dumps(entries, separators=(",", ":"))[1:-1].encode()

    def _data(self) -> Iterator[bytes | memoryview]:
        """Pieces are copied from their device one after the other."""
        for piece in self.pieces:
            yield piece.held.cpu().view(torch.uint8).numpy().data
        yield self._state()

    def _state(self) -> bytes:
        """Padded, so that the data of the next process are aligned."""
        size = sum(piece.held.nbytes for piece in self.pieces) + len(self.state)
        return self.state + b" " * (-size % LENGTH)


def shard_name(number: int) -> str:
    """Name of a file of tensors."""
    return f"shard-{number:05d}.safetensors"


def state_label(process: int) -> str:
    """Key of what a process keeps beside its tensors."""
    return f"{STATES}{process:05d}"


def read_label(label: str) -> tuple[str, int]:
    """The key of a run's tensor, and where the run begins in it."""
    key, _, run = label.rpartition("[")
    start, colon, _ = run.partition(":")
    return (key, int(start)) if colon and run.endswith("]") else (label, 0)


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
