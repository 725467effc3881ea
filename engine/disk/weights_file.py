"""Weights files: safetensors files that are read and written a few tensors at a time, however large they are.

Format: 8 bytes with the length of the header, the header (JSON: type, shape and offsets of each tensor), then
the tensors. Tensors of wide types come first, so that each begins at a multiple of its element size, as readers
require.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from omnivl.chain.names import current_name

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
        header: dict[str, dict[str, object]] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            self._offsets[name] = begin, end
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
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
        """Syncs the file to disk and closes it.

        Raises:
            OSError: The disk is full or gone.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


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
