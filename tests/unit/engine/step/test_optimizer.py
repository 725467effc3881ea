"""Parameter groups, worked out by hand on the synthetic chain."""

from dataclasses import replace

import pytest
import real_chain as real
import synthetic_chain as synthetic
import torch

from engine.step.optimizer import (
    ChainOptimizer,
    OptimizerConfig,
    Origins,
    layer_scales,
    parameter_groups,
    set_learning_rates,
)
from moe.config import AttributeConfig
from moe.experts.bank import ExpertBank
from omnivl.architectures import OmniVL, Unified, VisionConfig
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import LocalGather
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import UserError

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


class Holder(ChainLayer):
    """A layer around one module."""

    stack = "holder"

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: State) -> State:
        return state


def chain_of(module: torch.nn.Module) -> Chain:
    return Chain({"holder": Holder(module)})


def test_decay_leaves_out_what_it_should() -> None:
    chain = synthetic.build_synthetic_chain()
    groups = {group.name: group for group in parameter_groups(chain, OptimizerConfig())}
    assert set(groups) == {"decay", "no_decay"}
    assert "embed.patch.weight" in groups["decay"].names
    assert "contrast.projection.weight" in groups["decay"].names
    for name in (
        "embed.patch.bias",
        "embed.position",  # two-dimensional, but an embedding
        "embed.word_embedding.weight",
        "visual_00.block.norm.weight",
        "contrast.temperature",
    ):
        assert name in groups["no_decay"].names
    assert groups["no_decay"].weight_decay == 0.0
    assert groups["decay"].weight_decay == 0.05


def test_a_bank_of_experts_decays_its_matrices_and_not_its_biases() -> None:
    groups = {group.name: group for group in parameter_groups(chain_of(ExpertBank(2, 4, 8)), OptimizerConfig())}
    assert groups["decay"].names == ("holder.module.fc1_weight", "holder.module.fc2_weight")
    assert groups["no_decay"].names == ("holder.module.fc1_bias", "holder.module.fc2_bias")


@pytest.mark.parametrize("unified", [False, True], ids=["towers", "unified"])
@pytest.mark.parametrize("ffn", real.FILLINGS)
def test_tables_and_biases_of_real_chains_do_not_decay(ffn: str, unified: bool) -> None:
    chain = real.build_real_chain(LocalGather(), ffn=ffn, unified=unified)
    groups = parameter_groups(chain, OptimizerConfig(layer_decay=0.9))
    parameters = dict(chain.named_parameters())
    grouped = [name for group in groups for name in group.names]
    assert sorted(grouped) == sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    resting = {name for group in groups if group.weight_decay == 0.0 for name in group.names}
    tables = {f"embed.block.{name}" for name in ("visual.positions", "visual.times", "text.positions", "text.words")}
    banks = {name for name in grouped if name.endswith(("experts.fc1_bias", "experts.fc2_bias"))}
    assert bool(banks) == (ffn not in ("dense", "mome"))
    assert {name for name in resting if parameters[name].dim() > 1} == tables | banks
    assert all(name in resting for name in grouped if parameters[name].dim() < 2)


def test_relative_positions_and_banks_of_projections_do_not_decay() -> None:
    chains = {
        "relative.bias": replace(OmniVL.presets["tiny"], vision=VisionConfig(relative_positions=True)),
        "qkv.shared.experts.bias": replace(Unified.presets["tiny"], ffn=AttributeConfig(num_experts=2, attention=True)),
    }
    for ending, config in chains.items():
        with torch.device("meta"):
            chain = build_chain(config, (), TOKENS)
        decayed = [
            name for group in parameter_groups(chain, OptimizerConfig()) for name in group.names if group.weight_decay
        ]
        assert any(name.endswith(ending) for name, _ in chain.named_parameters())
        assert not any(name.endswith(ending) for name in decayed)


def test_every_trainable_parameter_is_in_one_group_and_twins_in_none() -> None:
    chain = synthetic.build_synthetic_chain()
    chain.get_submodule("text_00").requires_grad_(False)
    groups = parameter_groups(chain, OptimizerConfig(layer_decay=0.9), origins=Origins(foreign={"embed.patch.weight"}))
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, p in chain.named_parameters() if p.requires_grad)
    assert not any("momentum_block" in name or name.startswith("text_00") for name in names)


def test_layer_decay_counts_from_the_top_of_each_stack() -> None:
    config = replace(OmniVL.presets["tiny"], vision_layers=3, text_layers=1, alignment_layers=0, generation_layers=0)
    with torch.device("meta"):
        chain = build_chain(config, (), TOKENS)
    assert layer_scales(chain, 0.5) == {
        "embed": 0.0625,  # below the deepest stack: 0.5 ** (3 + 1)
        "visual_00": 0.125,
        "visual_01": 0.25,
        "visual_02": 0.5,
        "visual_norm": 1.0,
        "text_00": 0.5,
        "contrast": 1.0,
        "join": 1.0,
        "losses": 1.0,
    }


def test_pretrained_parts_have_their_own_rate() -> None:
    chain = synthetic.build_synthetic_chain()
    config = OptimizerConfig(lr=1.0, layer_decay=0.5, pretrained_lr_scale=0.1)
    groups = parameter_groups(chain, config, origins=Origins(foreign={"visual_01.block.inner.weight"}))
    scale = {name: group.lr_scale for group in groups for name in group.names}
    assert scale["visual_01.block.inner.weight"] == pytest.approx(0.05)  # 0.5 * 0.1
    assert scale["visual_01.block.outer.weight"] == pytest.approx(0.5)
    assert scale["losses.head.weight"] == 1.0


@pytest.mark.parametrize("unified", [False, True], ids=["towers", "unified"])
def test_new_heads_have_their_own_rate(unified: bool) -> None:
    """Heads that an earlier stage or a checkpoint gave have the rate of what else they gave."""
    chain = real.build_real_chain(LocalGather(), unified=unified)
    heads = {name for name, parameter in chain.named_parameters() if name.startswith("losses.")}
    heads = {name for name in heads if chain.get_parameter(name).requires_grad}
    earlier, foreign = {"losses.vocabulary.decoder.weight", "embed.block.text.words"}, {"losses.vocabulary.norm.weight"}
    assert heads > {*foreign, "losses.vocabulary.decoder.weight"}
    config = OptimizerConfig(lr=1.0, pretrained_lr_scale=0.1, new_head_lr_scale=5.0, lr_scales={"losses.vocabulary": 2})
    origins = Origins(foreign=foreign, earlier=earlier)
    scale = {name: group.lr_scale for group in parameter_groups(chain, config, origins) for name in group.names}
    for name, found in scale.items():
        of_pattern = 2.0 if name.startswith("losses.vocabulary") else 1.0
        of_origin = 0.1 if name in foreign else 5.0 if name in heads - earlier else 1.0
        assert found == pytest.approx(of_pattern * of_origin), name
    alone = parameter_groups(chain, config)  # nothing was given: every head is new
    assert {name for group in alone for name in group.names if group.lr_scale >= 5} == heads


def test_parts_have_their_own_rates() -> None:
    """The first pattern that names a parameter counts, beside layer decay."""
    chain = synthetic.build_synthetic_chain()
    config = OptimizerConfig(lr=1.0, layer_decay=0.5, lr_scales={"visual_01.block.inner": 4.0, "visual_*": 0.1})
    scale = {name: group.lr_scale for group in parameter_groups(chain, config) for name in group.names}
    assert scale["visual_01.block.inner.weight"] == pytest.approx(2.0)  # 0.5 * 4
    assert scale["visual_01.block.outer.weight"] == pytest.approx(0.05)  # 0.5 * 0.1
    assert scale["visual_00.block.inner.weight"] == pytest.approx(0.025)  # 0.25 * 0.1
    assert scale["losses.head.weight"] == 1.0
    with pytest.raises(UserError, match=r"optimizer.lr_scales: got 'visul_\*', which names no parameter"):
        parameter_groups(chain, OptimizerConfig(lr_scales={"visul_*": 0.1}))


def test_rates_are_set_per_group() -> None:
    chain = synthetic.build_synthetic_chain()
    config = OptimizerConfig(lr=1e-3, layer_decay=0.5, schedule="linear")
    groups = parameter_groups(chain, config)
    optimizer = ChainOptimizer([group.options for group in groups], config)
    rates = set_learning_rates(optimizer, groups, config.learning_rate(5, 10))
    assert rates["decay"] == pytest.approx(5e-4)
    assert [entry["lr"] for entry in optimizer.param_groups] == [rates[group.name] for group in groups]


def test_decay_is_decoupled() -> None:
    # Zero gradient, lr 0.1, decay 0.5: w <- w * (1 - 0.05), and no Adam update at all.
    parameter = torch.nn.Linear(2, 2)
    before = parameter.weight.detach().clone()
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    groups = parameter_groups(chain_of(parameter), config)
    optimizer = ChainOptimizer([group.options for group in groups], config)
    set_learning_rates(optimizer, groups, config.lr)
    for tensor in parameter.parameters():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    torch.testing.assert_close(parameter.weight.detach(), before * 0.95)


def test_refuses_a_stage_that_trains_nothing() -> None:
    chain = synthetic.build_synthetic_chain().requires_grad_(False)
    with pytest.raises(UserError) as error:
        parameter_groups(chain, OptimizerConfig())
    assert str(error.value) == (
        "optimizer: no parameter is trainable; got a stage that freezes every part: thaw one of them"
    )
