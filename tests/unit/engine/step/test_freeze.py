from collections.abc import Sequence

import pytest
from torch import nn

from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.backward import TEXT, VISUAL, Backward
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.layout import plan_layout
from omnivl.chain.names import stack_of
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError, UserError
from omnivl.objectives import UniVLC


class Products(ChainLayer):
    """Some products by name."""

    def __init__(self, stack: str, names: Sequence[str]) -> None:
        super().__init__()
        self.stack, self.level = stack, 0 if stack in (VISUAL, TEXT) else None
        self.branch = {"embed": TEXT, VISUAL: VISUAL, TEXT: TEXT}.get(stack)
        for name in names:
            self.add_module(name, nn.Linear(2, 2))

    def branch_of(self, name: str) -> str | None:
        """As that of an embedding."""
        return VISUAL if name.startswith(VISUAL) else self.branch

    def forward(self, state: State) -> State:
        """Nothing runs here."""
        raise NotImplementedError


def chain() -> Chain:
    layers = {"embed": ("visual", "words"), "visual_00": ("attention", "ffn"), "text_00": ("ffn",), "join": ("fuse",)}
    return Chain({name: Products(stack_of(name), parts) for name, parts in layers.items()})


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["embed"], {f"embed.{part}.{kind}" for part in ("visual", "words") for kind in ("weight", "bias")}),
        (["visual_*"], {f"visual_00.{part}.{kind}" for part in ("attention", "ffn") for kind in ("weight", "bias")}),
        (["visual_*.ffn"], {"visual_00.ffn.weight", "visual_00.ffn.bias"}),
        (["embed.words", "text_00.ffn.bias"], {"embed.words.weight", "embed.words.bias", "text_00.ffn.bias"}),
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
        "stages.0.freeze.1: got 'visual_0', which names no parameter; layers are embed, visual_00, text_00, join; "
        "did you mean 'visual_00'?"
    )


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], {"visual_00": Backward(), "text_00": Backward(), "join": Backward()}),
        (["embed.visual", "visual_*"], {"visual_00": Backward(False, 0, 0), "text_00": Backward()}),
        (["embed.words", "visual_*"], {"visual_00": Backward(True, 0, 0), "text_00": Backward()}),
        (["embed.words", "text_*"], {"visual_00": Backward(), "text_00": Backward(False, 0)}),
        (["visual_*.ffn"], {"visual_00": Backward(True, 0.5, 0.5)}),
        (["embed.visual"], {"embed": Backward(True, 0.5, 0.0)}),
        (["embed", "visual_*", "text_*"], {"join": Backward()}),
        (["*_00", "join"], {"text_00": Backward(True, 0), "join": Backward(True, 0)}),
        (["*"], {"visual_00": Backward(False, 0, 0), "text_00": Backward(False, 0), "join": Backward(False, 0)}),
    ],
)
def test_what_of_the_backward_pass_is_left(patterns: list[str], left: dict[str, Backward]) -> None:
    """An encoder has none where neither it nor what embeds its modality is trained; what joins them follows both."""
    model = chain()
    freeze(model, patterns, "stages.0.freeze")
    assert {name: model.named_layers[name].backward for name in left} == left


def test_a_block_of_a_branch_that_nothing_starts() -> None:
    model = Chain({"embed": Products("embed", ["words"]), "visual_00": Products("visual", ["ffn"])})
    with pytest.raises(ModelError) as caught:
        freeze(model, [], "stages.0.freeze")
    assert str(caught.value) == (
        "layer 'visual_00': got the branch 'visual', which no layer before it is of; allowed are None and those before "
        "it: 'text'; let branch_of of the layer that makes its input name 'visual'"
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
