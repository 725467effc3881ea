"""Weights files: what is written tensor by tensor is what safetensors writes and reads."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.disk.weights_file import WeightsFile, WeightsWriter
from engine.errors import CheckpointError

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "kernel": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "cursor": torch.tensor(7),
    "half": torch.arange(3, dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
}


def test_written_in_any_order_and_read_by_everybody(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    writer = WeightsWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()})
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.finish()
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(path, framework="pt") as file:  # a slice reads a part, which wants aligned tensors
        assert torch.equal(file.get_slice("kernel")[1:], TENSORS["kernel"][1:])


def test_reads_what_safetensors_wrote_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    stored = WeightsFile(path)
    assert set(stored.names) == TENSORS.keys()
    assert torch.equal(stored.read(["kernel"])["kernel"], TENSORS["kernel"])
    assert stored.read([]) == {}


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    writer = WeightsWriter(path, {"kernel": (torch.float32, (3, 5))})
    writer.finish()  # without its tensor
    with pytest.raises(CheckpointError, match=r"got a file that is no safetensors file or is truncated"):
        WeightsFile(path)
