"""What the pipeline host is made of: packing a state, and cutting a chain."""

from dataclasses import replace

import pytest
import real_chain as real
import torch
from torch import Tensor

from engine.hosts.micro_batch import LayoutKey
from engine.hosts.pipeline.cut import cut, layer_costs
from engine.hosts.pipeline.division import divide, divide_chain, idle_passes
from engine.hosts.pipeline.packing import key_of, pack, unpack
from omnivl.chain.gather import LocalGather
from omnivl.chain.state import State

KEY = LayoutKey("image_text", 2, 1, "letters")


def state_of(**tensors: Tensor) -> State:
    layout = real.plan_layout(*KEY)
    return State({name.replace("__", "/"): tensor for name, tensor in tensors.items()}, layout)


def test_a_state_comes_out_as_it_went_in() -> None:
    state = state_of(
        visual=torch.randn(2, 3, 4, requires_grad=True),
        text=torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True),
        momentum_visual=torch.randn(5, dtype=torch.bfloat16),
        text_mask=torch.tensor([[True, False, True]]),
        frames=torch.arange(7, dtype=torch.uint8),
        identity=torch.tensor([3, -1]),
        loss__mlm=torch.tensor(0.5, requires_grad=True),
        metric__mlm__accuracy=torch.tensor(0.25),
    )
    token = torch.zeros(1, requires_grad=True)
    packed = pack(state, token, KEY)
    _, words, raw = packed
    assert (words.dtype, words.shape, raw.dtype) == (torch.bfloat16, (2 * 1 + 2 * 24 + 6 + 2 * 1,), torch.uint8)
    out, _, key = unpack(packed, real.plan_layout)
    assert key_of(packed) == KEY
    assert key == KEY
    assert list(out) == list(state)
    assert out.layout == state.layout
    for name, tensor in state.items():
        assert out[name].dtype == tensor.dtype, name
        assert torch.equal(out[name], tensor), name
        assert out[name].requires_grad == tensor.requires_grad, name


def test_gradients_go_back_through_both_ends() -> None:
    visual, text = torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    token = torch.zeros(1, requires_grad=True)
    header, words, raw = pack(state_of(visual=visual * 2, text=text * 3), token, KEY)
    received = words.detach().requires_grad_()
    out, arrived, _ = unpack((header, received, raw), real.plan_layout)
    (out["visual"].square().sum() + 0.0 * arrived.sum()).backward()  # nobody reads the text
    assert received.grad is not None
    words.backward(received.grad)
    assert visual.grad is not None
    torch.testing.assert_close(visual.grad, 2 * 2 * (2 * visual.detach()))
    assert text.grad is not None
    assert not text.grad.any()


@pytest.mark.parametrize(
    ("costs", "stages", "found"),
    [
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
        ([5, 1, 1, 1, 1, 1], 2, [[0], [1, 2, 3, 4, 5]]),
        ([1, 2, 3, 4, 5], 3, [[0, 1, 2], [3], [4]]),
        ([0, 0, 7, 0], 4, [[0], [1], [2], [3]]),
        ([3, 3], 1, [[0, 1]]),
    ],
)
def test_the_dearest_stage_is_as_cheap_as_it_can_be(costs: list[float], stages: int, found: list[list[int]]) -> None:
    parts = [list(part) for part in cut(costs, stages)]
    dearest = max(sum(costs[index] for index in part) for part in parts)
    assert dearest == max(sum(costs[index] for index in part) for part in found)
    assert [index for part in parts for index in part] == list(range(len(costs)))
    assert len(parts) == stages
    assert all(parts)


PASSES = [("head", 0), ("a", 0), ("b", 0), ("middle", 0), ("a", 1), ("b", 1), ("tail", 0)]
TRAINED = {"head": 5, "a": 8, "b": 8, "middle": 0, "tail": 1}


def test_a_layer_is_trained_where_least_is() -> None:
    division = divide(PASSES, [range(4), range(4, 7)], TRAINED)
    assert division.passes == (tuple(PASSES[:4]), tuple(PASSES[4:]))
    assert division.tied == ["a", "b"]
    # The tail's stage has one element and takes a; the head's has five and takes b.
    assert division.owners == {"head": 0, "a": 1, "b": 0, "middle": 0, "tail": 1}
    assert (division.held(1), division.owned(1), division.copied(1)) == (["a", "b", "tail"], ["a", "tail"], ["b"])


def test_both_passes_on_one_stage_tie_nothing() -> None:
    division = divide(PASSES, [range(1), range(1, 6), range(6, 7)], TRAINED)
    assert division.tied == []
    assert division.held(1) == division.owned(1) == ["a", "b", "middle"]


def test_passes_without_work_are_left_out() -> None:
    chain = real.build_real_chain(LocalGather(), unified=True)
    joined = real.plan_unified_layout("image_text", 2, 1)
    apart = replace(joined, fused={})
    assert idle_passes(chain, [joined, apart]) == set()
    blocks = {(name, 1) for name in ("unified_00", "unified_01", "unified_norm")}
    assert idle_passes(chain, [apart]) == blocks  # a join that never joins stays: its layer has no other pass
    division = divide_chain(chain, [range(4), range(4, len(chain.passes))], [apart])
    assert division.tied == []
    assert not set(division.passes[1]) & blocks


def test_costs_follow_rows_and_active_experts() -> None:
    layouts = [real.plan_layout("image_text", 2, 1), real.plan_layout("video_text", 2, 4)]
    dense, sparse = (layer_costs(real.build_real_chain(LocalGather(), ffn=ffn), layouts) for ffn in ("dense", "limoe"))
    assert dense["visual_00", 0] == dense["visual_01", 0] > dense["visual_norm", 0] == 0
    assert dense["embed", 0] < dense["visual_00", 0]
    # Two of four experts and a shared one: three perceptrons instead of one, and a router.
    assert dense["text_00", 0] < sparse["text_00", 0] < 3 * dense["text_00", 0]
