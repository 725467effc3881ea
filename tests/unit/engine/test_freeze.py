import pytest
from torch import nn

from engine.freeze import freeze
from omnivl.errors import UserError


def chain() -> nn.Module:
    block = nn.Sequential()
    block.add_module("attention", nn.Linear(2, 2))
    block.add_module("ffn", nn.Linear(2, 2))
    layers = nn.Sequential()
    layers.add_module("embed", nn.Linear(2, 2))
    layers.add_module("visual_00", block)
    layers.add_module("text_00", nn.Linear(2, 2))
    return layers


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["embed"], {"embed.weight", "embed.bias"}),
        (["visual_*"], {f"visual_00.{part}.{kind}" for part in ("attention", "ffn") for kind in ("weight", "bias")}),
        (["visual_*.ffn"], {"visual_00.ffn.weight", "visual_00.ffn.bias"}),
        (["embed", "text_00.bias"], {"embed.weight", "embed.bias", "text_00.bias"}),
        ([], set()),
    ],
)
def test_patterns_name_beginnings(patterns: list[str], frozen: set[str]) -> None:
    model = chain()
    assert set(freeze(model, patterns, "stages.0.freeze")) == frozen
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


def test_pattern_that_names_nothing() -> None:
    with pytest.raises(UserError) as caught:
        freeze(chain(), ["embed", "visual_0"], "stages.0.freeze")
    assert str(caught.value) == (
        "stages.0.freeze.1: got 'visual_0', which names no parameter; layers are embed, visual_00, text_00. "
        "Did you mean 'visual_00'?"
    )
