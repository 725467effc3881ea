from dataclasses import replace

import pytest
import torch
from torch import nn

from moe.config import AttributeConfig, DenseConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.feed_forward import build_feed_forward
from moe.routers import TokenChoice
from moe.slot import Slot
from moe.tokens import Segment, Tokens
from moe.upcycle import translated

MODALITIES = ("image", "video", "text")
MIXED = Tokens(tuple(Segment(*run, attributes=(1,)) for run in (("text", 4), ("image", 5), ("video", 3))))
SPARSE = {"every": 1, "router": TokenChoice(renormalise=True).without_noise()}
FILLINGS = {
    "limoe": LIMoEConfig(num_experts=4, **SPARSE),
    "limoe, two": LIMoEConfig(num_experts=4, every=1, router=replace(SPARSE["router"], top_k=2)),
    "mome_limoe": MoMELIMoEConfig(pools={"image": 2, "text": 1}, common_experts=2, **SPARSE),
    "attribute": AttributeConfig(num_experts=4, every=1, noise=0.0, num_attributes=1),
    "mome": MoMEConfig(shared={"vision": ("image", "video")}),
}


def built(config: FeedForwardConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    holder = nn.Module()
    holder.ffn = build_feed_forward(config, 8, 16, Slot(0, MODALITIES, MODALITIES))
    return holder


def start_from(module: nn.Module, earlier: nn.Module) -> list[str]:
    """Puts in what can be translated; names of the rest."""
    left = []
    for name, parameter in module.named_parameters():
        value = translated(f"visual_00.block.{name}", parameter.shape, prefixed(earlier))
        if value is None:
            left.append(name)
        else:
            parameter.data.copy_(value)
    return left


def prefixed(module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"visual_00.block.{name}": tensor for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("config", FILLINGS.values(), ids=FILLINGS)
def test_experts_made_of_a_dense_layer_give_what_it_gives_and_merge_back_into_it(config: FeedForwardConfig) -> None:
    dense, experts, merged = built(DenseConfig(), 0), built(config, 1), built(DenseConfig(), 2)
    left = start_from(experts, dense)
    assert not any("experts" in name for name in left)
    assert all(name.split(".")[1] in ("router", "embed", "norm", "gate") for name in left)
    x = torch.randn(12, 8)
    torch.testing.assert_close(experts.ffn(x, MIXED).y, dense.ffn(x).y)
    assert start_from(merged, experts) == []
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, dense.get_parameter(name))


def test_merging_takes_the_mean_of_experts_that_differ() -> None:
    experts, merged = built(FILLINGS["limoe"], 0), built(DenseConfig(), 1)
    start_from(merged, experts)
    torch.testing.assert_close(merged.ffn.fc1.weight, experts.ffn.experts.fc1_weight.mean(0))
    torch.testing.assert_close(merged.ffn.fc2.weight, experts.ffn.experts.fc2_weight.mean(0).t())
    torch.testing.assert_close(merged.ffn.fc2.bias, experts.ffn.experts.fc2_bias.mean(0))


BANK = "visual_00.block.ffn.experts"


def test_noise_makes_experts_differ_by_as_much_as_was_asked() -> None:
    torch.manual_seed(0)
    first, second = 0.02 * torch.randn(64, 48) + 0.3, 0.5 * torch.randn(48, 64)
    dense = {"visual_00.block.ffn.fc1.weight": first, "visual_00.block.ffn.fc2.weight": second}
    for name, copied in ((f"{BANK}.fc1_weight", first), (f"{BANK}.fc2_weight", second.t())):
        shape = torch.Size([4, 64, 48])
        noisy = translated(name, shape, dense, noise=0.1, seed=3)
        still = translated(name, shape, dense, noise=0.0, seed=3)
        assert noisy is not None and still is not None
        assert torch.equal(still, copied.expand(shape))
        share = (noisy - still) / copied.std()
        # The deviation of a sample deviation of 3,072 numbers is 0.1 / sqrt(6,144) = 0.0013, of their mean 0.0018.
        assert share.flatten(1).std(dim=1).tolist() == pytest.approx([0.1] * 4, abs=0.006)
        assert share.flatten(1).mean(dim=1).tolist() == pytest.approx([0.0] * 4, abs=0.009)
        alike = torch.corrcoef(share.flatten(1)) - torch.eye(4)
        assert alike.abs().max() < 0.1, "experts draw apart"
        again, other = (translated(name, shape, dense, noise=0.1, seed=seed) for seed in (3, 4))
        assert again is not None and other is not None
        assert torch.equal(again, noisy)
        assert not torch.equal(other, noisy)


def test_noise_leaves_biases_and_perceptrons_by_modality_alone() -> None:
    dense = prefixed(built(DenseConfig(), 0))
    dense["visual_00.block.ffn.fc1.bias"] = torch.arange(16.0)
    bias = translated(f"{BANK}.fc1_bias", torch.Size([4, 16]), dense, noise=0.5, seed=3)
    assert bias is not None and torch.equal(bias, torch.arange(16.0).expand(4, 16))
    weight = translated(f"{BANK}.image.fc1.weight", torch.Size([16, 8]), dense, noise=0.5, seed=3)
    assert weight is not None and torch.equal(weight, dense["visual_00.block.ffn.fc1.weight"])


def test_what_has_another_shape_or_is_no_feed_forward_weight_is_not_translated() -> None:
    dense = prefixed(built(DenseConfig(), 0))
    wide = torch.Size([4, 32, 8])
    assert translated("visual_00.block.ffn.experts.fc1_weight", wide, dense) is None
    assert translated("visual_01.block.ffn.experts.fc1_weight", torch.Size([4, 16, 8]), dense) is None
    assert translated("visual_00.block.ffn.router.gate.weight", torch.Size([4, 8]), dense) is None
    assert translated("visual_00.block.attention.qkv.weight", torch.Size([24, 8]), dense) is None
