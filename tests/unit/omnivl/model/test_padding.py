"""Leaving out padded positions changes nothing at the real ones."""

import torch

from omnivl.model.config import ModelConfig
from omnivl.model.decoder import GroundedBlock
from omnivl.model.padding import Padding
from omnivl.model.text import BertBlock

CONFIG = ModelConfig(hidden_size=8, num_heads=2)
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_drop_and_restore_by_hand():
    x = torch.arange(6.0).reshape(2, 3, 1).requires_grad_()
    padding = Padding(MASK)
    packed = padding.drop(x)
    assert packed.flatten().tolist() == [0, 1, 2, 3]
    whole = padding.restore(packed * 2)
    assert whole.flatten().tolist() == [0, 2, 4, 6, 0, 0]
    (whole * torch.arange(6.0).reshape(2, 3, 1)).sum().backward()
    assert x.grad.flatten().tolist() == [0, 2, 4, 6, 0, 0]


def test_full_rows_are_left_alone():
    assert Padding.worth_dropping(torch.ones(2, 3, dtype=torch.bool)) is None
    assert Padding.worth_dropping(None) is None
    assert Padding.worth_dropping(MASK) is not None


def compare(monkeypatch, block, *inputs):
    found = []
    for drop in (True, False):
        if not drop:
            monkeypatch.setattr(Padding, "worth_dropping", classmethod(lambda cls, mask: None))
        block.zero_grad()
        x = inputs[0].clone().requires_grad_()
        out = block(x, MASK, *inputs[1:]).y[MASK]
        out.square().sum().backward()
        found.append([out, x.grad[MASK], *(p.grad.clone() for p in block.parameters())])
    for dropped, whole in zip(*found, strict=True):
        torch.testing.assert_close(dropped, whole)


def test_text_block_with_and_without(monkeypatch):
    torch.manual_seed(0)
    compare(monkeypatch, BertBlock(CONFIG).double(), torch.randn(2, 3, 8, dtype=torch.float64))


def test_grounded_block_with_and_without(monkeypatch):
    torch.manual_seed(0)
    memory = torch.randn(1, 5, 8, dtype=torch.float64)
    block = GroundedBlock(CONFIG, causal=True).double()
    compare(monkeypatch, block, torch.randn(2, 3, 8, dtype=torch.float64), memory, torch.tensor([0, 0]))
