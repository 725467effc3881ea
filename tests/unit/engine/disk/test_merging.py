"""Merging adapters while tensors pass."""

import pytest
import torch

from engine.disk.merging import merged, merged_kinds
from engine.errors import CheckpointError

MAP = "visual_00.block.attention.out"
TENSORS = {
    "embed.weight": torch.zeros(2),
    f"{MAP}.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    f"{MAP}.bias": torch.zeros(2),
    f"{MAP}.adapter.down": torch.tensor([[1.0, 0.0]]),
    f"{MAP}.adapter.up": torch.tensor([[1e-3], [0.0]]),
    f"{MAP}.adapter.scale": torch.tensor(2.0),
    "visual_00.block.attention.qkv.weight": torch.ones(2, 2, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("order", [list, sorted, lambda names: sorted(names, reverse=True)])
def test_a_weight_takes_its_adapter_in_whatever_order_they_come(order) -> None:
    found = dict(merged(((name, TENSORS[name]) for name in order(TENSORS)), TENSORS))
    # A bf16 beside 1 is 2^-7 away: 1.002 would be rounded to 1.
    assert found[f"{MAP}.weight"].tolist() == [[pytest.approx(1.002), 1.0], [1.0, 1.0]]
    kinds = merged_kinds({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()})
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == kinds
    assert found.keys() == {name for name in TENSORS if ".adapter." not in name}
    assert all(found[name] is TENSORS[name] for name in found if name != f"{MAP}.weight")


def test_an_adapter_that_is_not_whole_is_refused() -> None:
    part = {name: tensor for name, tensor in TENSORS.items() if not name.endswith("scale")}
    with pytest.raises(CheckpointError) as caught:
        dict(merged(part.items(), part))
    assert str(caught.value) == (f"{MAP}: got an adapter without its scale; allowed are whole ones; save it anew")
