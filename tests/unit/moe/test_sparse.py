from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe.config import DenseConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.dense import DenseFeedForward
from moe.feed_forward import build_feed_forward, is_routed
from moe.modality import ModalityFeedForward
from moe.routers import ExpertChoice, TokenChoice
from moe.routers.sums import RouterSums
from moe.slot import Slot
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens

MODALITIES = ("image", "video", "text")
MIXED = Tokens((Segment("text", 4), Segment("image", 5), Segment("video", 3)))
STILL = TokenChoice().without_noise()
BOTH = (False, True)


def built(config: FeedForwardConfig, block: int = 1, **slot) -> nn.Module:
    torch.manual_seed(0)
    return build_feed_forward(config, 8, 16, Slot(block, MODALITIES, MODALITIES, **slot))


def x_of(tokens: Tokens = MIXED) -> Tensor:
    return torch.randn(tokens.count, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        ({}, [1, 3, 5]),
        ({"every": 3}, [2, 5]),
        ({"blocks": (0, 4)}, [0, 4]),
        ({"blocks": (-1, -3)}, [3, 5]),
        ({"blocks": (1, -1)}, [1, 5]),
    ],
)
def test_experts_stand_where_they_are_named_or_in_the_last_block_of_each_group(
    options: dict, routed: list[int]
) -> None:
    config = LIMoEConfig(num_experts=2, **options)
    assert [block for block in range(6) if is_routed(config, block, 6)] == routed
    slots = [built(config, block, depth=6) for block in range(6)]
    assert [block for block, slot in enumerate(slots) if isinstance(slot, SparseFeedForward)] == routed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_the_dense_layer_bit_for_bit(dtype: torch.dtype) -> None:
    sparse = built(LIMoEConfig(num_experts=1, every=1, router=STILL))
    assert isinstance(sparse, SparseFeedForward)
    dense, bank = DenseFeedForward(8, 16), sparse.experts
    dense.fc1.weight.data, dense.fc1.bias.data = bank.fc1_weight[0], bank.fc1_bias[0]
    dense.fc2.weight.data, dense.fc2.bias.data = bank.fc2_weight[0].t(), bank.fc2_bias[0]
    x = x_of().to(dtype)
    assert torch.equal(sparse(x, MIXED).y, dense(x).y)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_output_is_the_sum_of_chosen_experts_times_gates(top_k: int) -> None:
    config = LIMoEConfig(num_experts=4, every=1, router=replace(STILL, top_k=top_k))
    layer, x = built(config), x_of()
    y = layer(x.view(3, 4, 8), MIXED).y
    assert y.shape == (3, 4, 8)
    routed = layer.router(x, MIXED.modality_ids(MODALITIES, x.device))
    bank = layer.experts
    for token in range(12):
        wanted = torch.zeros(8)
        for expert, gate in zip(routed.expert_TK[token].tolist(), routed.gate_TK[token], strict=True):
            inner = nn.functional.gelu(bank.fc1_weight[expert] @ x[token] + bank.fc1_bias[expert])
            wanted = wanted + gate * (inner @ bank.fc2_weight[expert] + bank.fc2_bias[expert])
        torch.testing.assert_close(y.view(12, 8)[token], wanted)


def test_shared_experts_see_every_token() -> None:
    config = LIMoEConfig(num_experts=4, every=1, router=STILL)
    plain, both = built(config), built(replace(config, shared_experts=2))
    both.load_state_dict(plain.state_dict(), strict=False)
    x = x_of()
    assert both.shared.fc1.weight.shape == (32, 8)
    torch.testing.assert_close(both(x, MIXED).y, plain(x, MIXED).y + both.shared(x).y)


def test_padding_gets_nothing_and_counts_for_nothing() -> None:
    layer, x = built(LIMoEConfig(num_experts=2, every=1, router=STILL)), x_of()
    valid = torch.arange(12) % 3 != 0
    out = layer(x, Tokens(MIXED.segments, valid))
    assert not out.y[~valid].any()
    torch.testing.assert_close(out.y[valid], layer(x, MIXED).y[valid])
    sums = RouterSums.unpack(out.router_sums, 3)
    assert sums.tokens_M.tolist() == [4, 2, 2]
    assert sums.chosen_ME.sum().item() == 8


def test_above_capacity_the_least_sure_tokens_get_nothing() -> None:
    config = LIMoEConfig(num_experts=2, every=1, router=replace(STILL, capacity_factor=0.6))
    layer, x = built(config), x_of()
    layer.router.gate.weight.data[1] = -10 * layer.router.gate.weight.data[0]  # all to the same, more or less surely
    x = x * torch.sign(x @ layer.router.gate.weight[1])[:, None]
    out = layer(x, MIXED)  # 12 * 0.6 / 2 = 3.6, up to 4
    gate = layer.router(x, MIXED.modality_ids(MODALITIES, x.device)).gate_TK.flatten()
    served = out.y.any(-1)
    assert served.sum().item() == 4
    assert gate[served].min() >= gate[~served].max()
    assert RouterSums.unpack(out.router_sums, 3).dropped_M.sum().item() == 8
    first = built(replace(config, router=replace(config.router, priority=False)))
    first.load_state_dict(layer.state_dict())
    assert first(x, MIXED).y.any(-1).tolist() == [True] * 4 + [False] * 8


def test_pools_keep_modalities_apart_and_the_common_experts_join_them() -> None:
    config = MoMELIMoEConfig(pools={"image": 2, "text": 1}, common_experts=1, every=1, router=STILL)
    layer = built(config)
    assert config.num_experts == 4
    sums = RouterSums.unpack(layer(x_of(), MIXED).router_sums, 3)
    allowed = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1]])
    assert not (sums.probs_ME * (1 - allowed)).any()
    torch.testing.assert_close(sums.probs_ME.sum(1), sums.tokens_M)
    assert sums.chosen_ME[1].tolist() == [0, 0, 0, 3]


def test_every_second_block_has_experts() -> None:
    config = LIMoEConfig(num_experts=2, every=2)
    kinds = [type(built(config, block)) for block in range(4)]
    assert kinds == [DenseFeedForward, SparseFeedForward, DenseFeedForward, SparseFeedForward]
    assert {type(built(replace(config, every=1), block)) for block in range(3)} == {SparseFeedForward}
    assert type(built(DenseConfig())) is DenseFeedForward


def test_each_modality_has_its_own_perceptron() -> None:
    layer, x = built(MoMEConfig()), x_of()
    assert isinstance(layer, ModalityFeedForward)
    assert sorted(layer.experts) == ["image", "text", "video"]
    y = layer(x.view(4, 3, 8), MIXED).y.view(12, 8)
    for name, part in {"text": slice(0, 4), "image": slice(4, 9), "video": slice(9, 12)}.items():
        torch.testing.assert_close(y[part], layer.experts[name](x[part]).y)
    assert layer(x, MIXED).router_sums is None


def test_modalities_can_share_a_perceptron() -> None:
    layer, x = built(MoMEConfig(shared={"vision": ("image", "video")})), x_of()
    assert sorted(layer.experts) == ["text", "vision"]
    torch.testing.assert_close(layer(x, MIXED).y[4:], layer.experts["vision"](x[4:]).y)


def test_fused_sequences_have_their_own_perceptron_from_a_block_on() -> None:
    fused = Tokens((Segment("image", 3), Segment("text", 4, fused=True), Segment("image", 5, fused=True)))
    x = x_of(fused)
    low, high = built(MoMEConfig(fusion_from=2), 1, fused=BOTH), built(MoMEConfig(fusion_from=2), 2, fused=BOTH)
    assert sorted(low.experts) == ["image", "text", "video"]
    assert sorted(high.experts) == ["fusion", "image", "text", "video"]
    torch.testing.assert_close(low(x, fused).y[3:7], low.experts["text"](x[3:7]).y)
    torch.testing.assert_close(high(x, fused).y[3:], high.experts["fusion"](x[3:]).y)
    torch.testing.assert_close(high(x, fused).y[:3], high.experts["image"](x[:3]).y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ()}, "ffn.blocks: got no block, allowed is null or one block or more"),
        ({"blocks": (1, 1)}, "ffn.blocks: got [1, 1], allowed is each block once"),
        (
            {"blocks": (1,), "every": 3},
            "ffn.every: got 3 beside blocks [1], allowed is one of the two: leave every out where blocks are named",
        ),
        (
            {"num_experts": 2, "router": TokenChoice(top_k=3)},
            "ffn.num_experts: got 2 with 3 experts per token, allowed is 3 or more",
        ),
        (
            {"num_experts": 2, "router": ExpertChoice(experts_per_token=2.5)},
            "ffn.num_experts: got 2 with 2.5 experts per token, allowed is 2.5 or more",
        ),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="ffn") as caught:
        LIMoEConfig(**options)
    assert str(caught.value) == message


def test_contradictions_between_pools_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ffn.pools: got 1 experts for text and 0 common ones, allowed is 2 or more"):
        MoMELIMoEConfig(pools={"text": 1}, common_experts=0, router=TokenChoice(top_k=2))
    with pytest.raises(ValueError, match=r"ffn.shared: got image in more than one group, allowed is one"):
        MoMEConfig(shared={"a": ("image",), "b": ("image", "text")})
