"""Weights files: what is written tensor by tensor is what safetensors writes and reads."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.disk.weights_file import WeightsFile, WeightsWriter, check_weights, find_damage
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


def test_a_flipped_bit_is_found_anywhere(tmp_path: Path) -> None:
    """Every seventh bit: of the length, the metadata with the hash, names and shapes, the first and the last tensor."""
    path = tmp_path / "weights.safetensors"
    writer = WeightsWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()})
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    content = path.read_bytes()
    assert find_damage(path) is None
    unseen = []
    for bit in range(0, 8 * len(content), 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if find_damage(path) is None:
            unseen.append((bit, content[bit // 8 - 5 : bit // 8 + 5]))
    assert not unseen
    with pytest.raises(CheckpointError, match="truncated or changed"):
        check_weights(path)


def test_what_is_no_regular_file_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "missing", "."):
        assert "cannot be read" in str(find_damage(tmp_path / name))
