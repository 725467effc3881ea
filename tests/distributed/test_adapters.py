"""A stage with low-rank adapters on every kind of host: losses, norms and weights are those of one plain process."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import test_layouts as layouts
import torch

from engine.disk.merging import merged
from engine.step.adapters import LoraConfig, adapt_layer, train_adapters
from moe.linear import ROLES, Adapter
from omnivl.architectures.build import Settle
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather

pytestmark = pytest.mark.distributed

LORA = LoraConfig(rank=3, alpha=6.0, on=ROLES)
HOSTS = ["plain", "zero1", "zero3-built", "pipe2-zero0", "pipe2-zero1"]


class Adapted(layouts.Model):
    """The real chain with every objective, twins and a queue; its layers get adapters as soon as they are made."""

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        def give(name: str, layer: ChainLayer) -> None:
            adapt_layer(name, layer, LORA, layouts=self.layouts())
            for module in layer.modules():
                if isinstance(module, Adapter) and module.up.requires_grad:  # away from zero, so that A learns at once
                    torch.nn.init.constant_(module.up, 0.02)
            if settle is not None:
                settle(name, layer)

        chain = super().build(gather, give, seed)
        train_adapters(chain)
        return chain


def train(hosts: Sequence[str], name: str) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from the same weights."""
    return layouts.train(Adapted(name), hosts)


@cache
def reference(name: str) -> dict[str, Any]:
    return train(["plain"], name)["plain"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("real-joint", HOSTS),
        pytest.param("real-joint-bf16", ["zero1", "zero3-built", "pipe2-zero1"], marks=pytest.mark.full),
        pytest.param("real-unified-muon", ["zero1", "zero3-built", "pipe2-zero1"], marks=pytest.mark.full),
    ],
)
def test_hosts_agree(run_distributed: Any, name: str, hosts: list[str]) -> None:
    ranks = run_distributed(train, processes=2, limit=250, hosts=hosts, name=name)
    wanted = reference(name)
    begin = dict(Adapted(name).build(layouts.make_gather(None)).state_dict())
    moved = {one for one, tensor in wanted["weights"].items() if not torch.equal(tensor, begin[one])}
    assert any(".block." in one and one.endswith(".adapter.down") for one in moved)
    assert any("momentum_block" in one and one.endswith(".adapter.up") for one in moved), "twins follow"
    still = {one for one in moved if not one.startswith("losses.") and ".adapter." not in one and "queue" not in one}
    assert not still, "nothing else is trained"
    for host in hosts:
        layouts.assert_equal_runs(ranks[0][host], wanted, Adapted(name).tolerances)
    weights = ranks[0][hosts[0]]["weights"]
    assert not [one for one, _ in merged(weights.items(), weights) if ".adapter." in one]
