"""Tensors that travel to a device as one."""

import pytest
import torch

from engine.hosts.sending import apart, sent, together

TENSORS = [
    torch.arange(7, dtype=torch.uint8),
    torch.tensor(0.5),
    torch.randn(3, 5).t(),
    torch.tensor([[True, False, True]]),
    torch.empty(0, 4, dtype=torch.int64),
    torch.arange(5),
    torch.randn(2, 3, dtype=torch.bfloat16),
]


def test_they_come_out_as_they_went_in() -> None:
    whole = together(TENSORS, torch.zeros(256, dtype=torch.uint8))
    found = apart(whole, [(one.shape, one.dtype) for one in TENSORS])
    for one, other in zip(found, TENSORS, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
        assert one.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])])
def test_every_device_gets_them(device: str) -> None:
    found = sent(TENSORS, torch.device(device))
    assert [one.device.type for one in found] == [device] * len(TENSORS)
    for one, other in zip(found, TENSORS, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if device != "meta":
            assert torch.equal(one.cpu(), other)
