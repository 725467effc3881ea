"""Leaving out padded positions changes nothing at the real ones."""

import torch

from omnivl.architectures import OmniVL
from omnivl.chain.positions import chosen_positions
from omnivl.parts.bert import BertBlock
from omnivl.parts.decoder import GroundedBlock
from omnivl.parts.padding import Padding

CONFIG = OmniVL(hidden_size=8, num_heads=2).stacks["text"]
MASK = torch.tensor([[True, True, True], [True, False, False]])
MANY = torch.arange(7) < torch.tensor([7, 2, 3, 1, 5, 4, 2, 3, 6, 1, 1, 2, 3])[:, None]
"""40 real positions of 13 rows: two padded ones are kept to fill up 42."""


def test_drop_and_restore_by_hand():
    x = torch.arange(6.0).reshape(2, 3, 1).requires_grad_()
    padding = Padding(MASK)
    packed = padding.drop(x)
    assert packed.flatten().tolist() == [0, 1, 2, 3]
    whole = padding.restore(packed * 2)
    assert whole.flatten().tolist() == [0, 2, 4, 6, 0, 0]
    (whole * torch.arange(6.0).reshape(2, 3, 1)).sum().backward()
    assert x.grad.flatten().tolist() == [0, 2, 4, 6, 0, 0]


def test_few_numbers_of_positions_occur():
    torch.manual_seed(0)
    numbers = set()
    for _ in range(50):
        mask = torch.rand(32, 16) < 0.4
        chosen = chosen_positions(mask)
        real = int(mask.sum())
        assert chosen[:real].tolist() == mask.flatten().nonzero()[:, 0].tolist()
        assert not mask.flatten()[chosen[real:]].any()
        assert len(set(chosen.tolist())) == len(chosen)
        assert len(chosen) % 8 == 0  # 32 / 4
        assert 0 <= len(chosen) - real < 8
        numbers.add(len(chosen))
    assert len(numbers) < 12
    assert chosen_positions(torch.ones(6, 3, dtype=torch.bool)).tolist() == list(range(18))
    assert len(chosen_positions(torch.zeros(32, 16, dtype=torch.bool))) == 0


def test_full_rows_are_left_alone():
    assert Padding.worth_dropping(torch.ones(2, 3, dtype=torch.bool)) is None
    assert Padding.worth_dropping(None) is None
    assert Padding.worth_dropping(MASK) is not None


def compare(monkeypatch, block, *inputs, mask=MASK):
    found = []
    for drop in (True, False):
        if not drop:
            monkeypatch.setattr(Padding, "worth_dropping", classmethod(lambda cls, mask, kept=None: None))
        block.zero_grad()
        x = inputs[0].clone().requires_grad_()
        out = block(x, mask, *inputs[1:]).y[mask]
        out.square().sum().backward()
        found.append([out, x.grad[mask], *(p.grad.clone() for p in block.parameters())])
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


def test_text_block_with_filled_up_positions(monkeypatch):
    torch.manual_seed(0)
    assert len(Padding(MANY).index) == 42
    compare(monkeypatch, BertBlock(CONFIG).double(), torch.randn(13, 7, 8, dtype=torch.float64), mask=MANY)
