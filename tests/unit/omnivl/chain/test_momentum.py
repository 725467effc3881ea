"""Momentum twins by hand, and with storage that is sharded."""

import pytest
import torch
from torch import nn

from omnivl.chain.momentum import ema_update_, frozen_twin


def test_update_by_hand():
    twin, online = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, weight, bias in ((twin, 1.0, -1.0), (online, 3.0, 1.0)):
        nn.init.constant_(module.weight, weight)
        nn.init.constant_(module.bias, bias)
    ema_update_(twin, online, 0.75)
    # 0.75 x 1 + 0.25 x 3 = 1.5; 0.75 x -1 + 0.25 x 1 = -0.5
    assert twin.weight.item() == 1.5
    assert twin.bias.item() == -0.5
    assert online.weight.item() == 3.0


def test_frozen_twin_is_an_exact_copy_without_gradient():
    twin, online = nn.Linear(3, 2), nn.Linear(3, 2)
    frozen_twin(twin, online)
    assert torch.equal(twin.weight, online.weight)
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_update_works_on_the_local_part_of_sharded_parameters():
    twin, online = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    shards = {id(twin.weight): torch.tensor([0.0, 0.0]), id(online.weight): torch.tensor([1.0, 2.0])}
    for module in (twin, online):
        module.weight.data = torch.empty(0)
    ema_update_(twin, online, 0.5, storage=lambda parameter: shards[id(parameter)])
    assert shards[id(twin.weight)].tolist() == [0.5, 1.0]


def test_other_structure_is_refused():
    with pytest.raises(AssertionError, match="twin is stored as"):
        ema_update_(nn.Linear(2, 2), nn.Linear(3, 2), 0.5)
