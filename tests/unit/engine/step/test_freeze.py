import pytest
from torch import nn

from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import UserError
from omnivl.objectives import UniVLC


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
        "stages.0.freeze.1: got 'visual_0', which names no parameter; layers are embed, visual_00, text_00; "
        "did you mean 'visual_00'?"
    )


def test_what_a_stage_has_no_use_for_rests() -> None:
    sizes = {"hidden_size": 8, "num_heads": 1, "vision_layers": 2, "text_layers": 1, "patch_size": 4, "vocab_size": 9}
    config = OmniVL(**sizes, alignment_layers=2, generation_layers=1, image_size=8, video_size=8, num_frames=2)
    chain = build_chain(config, [UniVLC()], SpecialTokens(0, 1, 2, 3, 4, vocab_size=9, num_reserved=5))
    decoders = sum(p.numel() for name, p in chain.named_parameters() if name.startswith(("alignment", "generation")))
    stills = plan_layout([UniVLC()], "image_text", 4, 1)
    clips = plan_layout([UniVLC()], "video_text", 4, 2)
    idle = freeze_idle(chain, [stills, clips])
    # Nothing is masked here, so that the mask token of 8 values rests too.
    assert idle == {"embed": 8, "alignment": idle["alignment"], "generation": decoders - idle["alignment"]}
    # norm 2 x 8, qkv 8 x 24 + 24, out 8 x 8 + 8, temporal_fc 8 x 8 + 8: 376, twice; patches 48 x 8 and times 2 x 8.
    assert freeze_idle(chain, [stills]) == {"embed": 48 * 8 + 2 * 8, "visual": 2 * 376}
    assert not chain.get_submodule("visual_00").block.temporal.norm.weight.requires_grad
    assert chain.get_submodule("visual_00").block.attention.qkv.weight.requires_grad
    assert freeze_idle(chain, [stills]) == {}
