"""Weights files: safetensors files that are read and written a few tensors at a time, however large they are.

Format: 8 bytes with the length of the header, the header (JSON: type, shape and offsets of each tensor), then
the tensors. Tensors of wide types come first, so that each begins at a multiple of its element size, as readers
require.

The header's metadata hold the SHA-256 of the file, computed with zeros in the place of the hash. Files of earlier
versions have no metadata.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.processes.files import read_whole
from omnivl.chain.names import current_name
from omnivl.data.plain_files import not_through_links, open_plain

_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}

_ENTRY = {"dtype", "shape", "data_offsets"}
_HASH, _NO_HASH = "sha256", "0" * 64
_ANOTHER = "it is another file than the one with which complete.json says that the stage was completed"
WEIGHTS, COMPLETE = "weights.safetensors", "complete.json"
"""Files of a stage: its weights, and the marker that says that they are there."""
_CHUNK = 1 << 24
"""Bytes that are hashed at a time."""


class WeightsWriter:
    """Writes a file whose tensors are known by type and shape beforehand and come in any order.

    The file is whole once every tensor has been written; only a reader checks that.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        """Writes the header.

        Args:
            path: The file, which is replaced.
            tensors: Type and shape of each tensor by name.

        Raises:
            OSError: It cannot be written.
        """
        self._offsets: dict[str, tuple[int, int]] = {}
        header: dict[str, dict[str, object]] = {"__metadata__": {_HASH: _NO_HASH}}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            self._offsets[name] = begin, end
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._path = path
        self._file = open(path, "wb", opener=not_through_links)  # noqa: SIM115 - finish closes it
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, on the CPU, of the announced type and shape.

        Raises:
            OSError: The disk is full or gone.
        """
        begin, end = self._offsets[name]
        assert tensor.numel() * tensor.element_size() == end - begin, f"{name}: other than announced"
        self._file.seek(self._data + begin)
        if end > begin:
            self._file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Writes the hash, syncs the file to disk and closes it.

        Raises:
            OSError: The disk is full or gone.
        """
        self._file.flush()
        header = _head(self._path, self._data)
        self._file.seek(header.index(_NO_HASH.encode()))
        self._file.write(_digest(self._path, header).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def find_damage(path: Path) -> str | None:
    """Describes what is wrong with a weights file; None if it matches its hash, or an earlier version wrote it.

    The weights of a stage also have to be those with which ``complete.json`` beside them says that it was completed.

    Args:
        path: Written by ``WeightsWriter``, or by safetensors, which knows no hash.
    """
    try:
        expected = _hash_beside(path)
        size = path.stat().st_size
        length = int.from_bytes(_head(path, 8), "little")
        if size < 8 or length > size - 8:
            return "it is cut short, or its length is changed"
        header = _head(path, 8 + length)
        entries = json.loads(header[8:])
        if not isinstance(entries, dict):
            return "its header is no mapping"
        metadata = entries.get("__metadata__", {})
        if not isinstance(metadata, dict):
            return "its metadata are no mapping"
        tensors = (entry for name, entry in entries.items() if name != "__metadata__")
        if not all(isinstance(entry, dict) and entry.keys() == _ENTRY for entry in tensors):
            return "its header has an entry that is no tensor"
        digest = metadata.get(_HASH)
        if digest is None and all(len(str(value)) != len(_NO_HASH) for value in metadata.values()):
            return None if expected is None else _ANOTHER  # of an earlier version, or of other origin
        if not isinstance(digest, str) or len(digest) != len(_NO_HASH) or header.count(digest.encode()) != 1:
            return "its hash is changed"
        if _digest(path, header.replace(digest.encode(), _NO_HASH.encode())) != digest:
            return "it does not have the SHA-256 that was written into it"
        if expected not in (None, digest):
            return _ANOTHER
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return None


def written_hash(path: Path) -> str:
    """The hash in the header of a file that ``WeightsWriter`` has written.

    Raises:
        OSError: It cannot be read.
    """
    length = int.from_bytes(_head(path, 8), "little")
    return str(json.loads(_head(path, 8 + length)[8:])["__metadata__"][_HASH])


def check_weights(path: Path) -> None:
    """Refuses a weights file that does not match its hash.

    Raises:
        CheckpointError: It is damaged.
    """
    if (damage := find_damage(path)) is not None:
        raise CheckpointError(
            f"{path}: got a file that is no safetensors file or is truncated or changed: {damage}; write it again: "
            "where complete.json lies beside it, remove that, and omnivl pretrain takes it from the newest checkpoint"
        )


def _hash_beside(path: Path) -> str | None:
    """The hash that a stage's marker has of its weights; None where it has none, or who reads it reports it damaged."""
    if path.name != WEIGHTS or not path.with_name(COMPLETE).exists():
        return None
    try:
        marker = json.loads(read_whole(path.with_name(COMPLETE)))
    except (OSError, ValueError, RecursionError):
        return None
    said = marker.get("weights") if isinstance(marker, dict) else None
    return said if isinstance(said, str) else None


def _head(path: Path, size: int) -> bytes:
    with open_plain(path) as file:
        return file.read(size)


def _digest(path: Path, header: bytes) -> str:
    """SHA-256 of a file with another header of the same length."""
    digest = hashlib.sha256(header)
    with open_plain(path) as file:
        file.seek(len(header))
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


class WeightsFile:
    """A weights file; only the requested tensors are read into memory.

    Attributes:
        names: Names of all its tensors, in their present form.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            CheckpointError: The file is no safetensors file or truncated.
        """
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._stored: dict[str, str] = {current_name(name): name for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: got a file that is no safetensors file or is truncated ({error}); train the stage again"
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """See the class."""
        return tuple(self._stored)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some tensors. They keep their part of the file mapped for as long as they live."""
        with safe_open(self._path, framework="pt") as file:
            return {name: file.get_tensor(self._stored[name]) for name in names}

    def read_shapes(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some tensors without their values, on the meta device. Only the header is read."""
        found = {}
        with safe_open(self._path, framework="pt") as file:
            for name in names:
                stored = file.get_slice(self._stored[name])
                dtype = _TYPES[stored.get_dtype()]
                found[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
        return found
