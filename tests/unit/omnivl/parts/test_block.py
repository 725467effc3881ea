from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe.config import LIMoEConfig
from moe.routers import TokenChoice
from moe.routers.sums import RouterSums
from moe.sparse import SparseFeedForward
from moe.tokens import Tokens
from omnivl.chain.state import State, StepLayout
from omnivl.parts.block import BlockLayer
from omnivl.parts.sizes import MODALITIES

BALANCED = LIMoEConfig(num_experts=3, every=1, router=TokenChoice(selection_bias_rate=0.1).without_noise())
PLAIN = replace(BALANCED, router=TokenChoice().without_noise())
LAYOUT = StepLayout("image_text", 2, 1)


class TwoSlots(nn.Module):
    """A block with two feed-forward slots, one of them below a module of its own."""

    def __init__(self, first: LIMoEConfig, second: LIMoEConfig) -> None:
        super().__init__()
        self.first = SparseFeedForward(first, 4, 8, MODALITIES)
        self.inner = nn.ModuleDict({"second": SparseFeedForward(second, 4, 8, MODALITIES)})

    def forward(self, x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        tokens = Tokens.of("image", x)
        first = self.first(x, tokens)
        second = self.inner["second"](first.y, tokens)
        return second.y, {"first": first.router_sums, "inner.second": second.router_sums}


def layer_of(first: LIMoEConfig, second: LIMoEConfig) -> BlockLayer:
    torch.manual_seed(0)

    class Layer(BlockLayer):
        def forward(self, state: State) -> State:
            y, sums = self.run(state["visual"])
            return self.with_routing(state.updated(visual=y), sums)

    return Layer("block_00", lambda still: TwoSlots(first, second))


def passed(layer: BlockLayer) -> State:
    return layer(State({"visual": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))}, LAYOUT))


def served(state: State, name: str) -> Tensor:
    return RouterSums.unpack(state[f"router/block_00/{name}"].detach(), len(MODALITIES)).chosen_ME.sum(0)


def test_every_slot_of_a_block_reports_and_is_balanced_by_what_it_served() -> None:
    layer = layer_of(BALANCED, BALANCED)
    state = passed(layer)
    assert set(state.named("router")) == {"block_00/first", "block_00/inner.second"}
    counts = {name: served(state, name) for name in ("first", "inner.second")}
    assert not torch.equal(*counts.values())
    assert layer.tokens_per_expert.keys() == counts.keys()
    passed(layer)  # a second micro-batch of the step
    layer.after_step()
    for name, count in counts.items():
        bias = layer.block.get_submodule(name).router.bias_E
        torch.testing.assert_close(bias, 0.1 * (2 * count.mean() - 2 * count).sign())
    assert not layer.tokens_per_expert


def test_only_slots_with_a_bias_are_counted() -> None:
    layer = layer_of(PLAIN, BALANCED)
    assert len(passed(layer).named("router")) == 2
    assert set(layer.tokens_per_expert) == {"inner.second"}
    layer.discard_step()
    layer.after_step()
    assert not layer.block.inner["second"].router.bias_E.any()
    with torch.no_grad():
        passed(layer)
    assert not layer.tokens_per_expert, "nothing is counted outside of training"


def test_sums_that_no_slot_can_be_found_for_are_refused() -> None:
    layer, state = layer_of(PLAIN, PLAIN), State({}, LAYOUT)
    with pytest.raises(AssertionError, match=r"block_00: one vector of sums for 2 routed slots: first, inner\.second"):
        layer.with_routing(state, torch.zeros(1))
    with pytest.raises(AssertionError, match=r"block_00: sums of \['third'\], routed slots are first, inner\.second"):
        layer.with_routing(state, {"third": torch.zeros(1)})
