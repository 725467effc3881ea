"""Presets, overrides and their errors."""

import sys
from dataclasses import replace
from typing import get_args

import patience
import pytest
import torch

from moe.config import AttributeConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.routers import NoisyRouterLossConfig, TokenChoice
from omnivl.architectures import ArchitectureConfig, OmniVL, Unified, VisionConfig
from omnivl.architectures.base import _with_stacks, check
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError


def test_every_preset_fits_together():
    for config in OmniVL.presets.values():
        check(config)


@pytest.mark.parametrize("kind", get_args(get_args(ArchitectureConfig)[0]), ids=lambda kind: kind.__name__)
def test_what_is_asked_of_all_stacks_reaches_those_of_parts(kind):
    """A language model is a part of an architecture, and has a stack."""
    routed = LIMoEConfig(num_experts=2, implementation="loop")
    for preset in kind.presets.values():
        assert preset.recomputing("ffn").recomputed == ("ffn",)
        changed = _with_stacks(preset, lambda stack: replace(stack, ffn=routed)).portable()
        if not hasattr(preset, "ffn"):  # which fills every stack
            assert {ffn.implementation for ffn in changed.fillings.values()} == {"auto"}


def test_no_architecture_imports_the_compiler_before_it_has_storage():
    """A plan that is only checked builds outlines, and the compiler takes 2 s."""
    script = """
import sys
from typing import get_args
from omnivl.architectures import ArchitectureConfig
from omnivl.architectures.build import outline
for kind in get_args(get_args(ArchitectureConfig)[0]):
    for preset in kind.presets.values():
        outline(preset)
        assert "torch._dynamo" not in sys.modules, kind.__name__
    print(kind.__name__, len(kind.presets))
"""
    told = patience.run([sys.executable, "-c", script], capture_output=True, text=True, limit=120)
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) == len(get_args(get_args(ArchitectureConfig)[0]))


def test_base_takes_both_kinds_of_clips():
    assert OmniVL.presets["base"] == OmniVL()
    assert replace(OmniVL(), video_size=224, num_frames=8).inputs.grid(is_video=True) == (14, 14)
    assert OmniVL.presets["base"].inputs.grid(is_video=True) == (7, 7)


def test_base_has_the_sizes_of_vit_b_and_bert_base():
    with torch.device("meta"):
        chain = build_chain(OmniVL.presets["base"], (), SpecialTokens(0, 1, 2, 3, 4, vocab_size=100, num_reserved=5))
    visual, text = (
        sum(p.numel() for layer in chain.layers if layer.stack == stack for p in layer.parameters())
        for stack in ("visual", "text")
    )
    # ViT-B/16 without its head is 85,798,656. Of it 197 x 768 + 768 + 590,592 are embeddings, leaving 85,056,000 for
    # 12 blocks and the last norm. The temporal parts add 12 x (2 x 768 + 5 x (768^2 + 768)).
    assert visual == 85_056_000 + 12 * (2 * 768 + 5 * (768**2 + 768))
    assert text == 85_054_464  # BertModel's encoder


def test_giant_has_its_inner_size_exactly():
    assert OmniVL.presets["giant"].inner_size == 6144


def test_all_misfits_at_once():
    with pytest.raises(ModelError) as error:
        check(replace(OmniVL.presets["tiny"], num_heads=5, image_size=65, num_frames=7, tubelet_size=2))
    assert str(error.value).splitlines() == [
        "model.hidden_size: got 192; allowed a multiple of num_heads 5; change either",
        "model.image_size: got 65; allowed a multiple of patch_size 8; change either",
        "model.num_frames: got 7; allowed a multiple of tubelet_size 2; change either",
    ]


def test_modalities_that_the_model_does_not_know_are_named():
    router = TokenChoice(losses=NoisyRouterLossConfig(local_entropy={"txt": 1.0}, min_experts={"image": 2}))
    with pytest.raises(ModelError) as caught:
        check(OmniVL(ffn=MoMELIMoEConfig(pools={"images": 1, "text": 1}, common_experts=0, router=router)))
    assert str(caught.value).splitlines() == [
        "model.ffn.pools: got 'images'; allowed 'image', 'video', 'text'; did you mean 'image'?",
        "model.ffn.router.losses.local_entropy: got 'txt'; allowed 'image', 'video', 'text'; did you mean 'text'?",
        "model.ffn.pools: got no pool for image and 0 common experts; allowed 1 or more, as many as a token needs; "
        "give it a pool or raise common_experts",
        "model.ffn.pools: got no pool for video and 0 common experts; allowed 1 or more, as many as a token needs; "
        "give it a pool or raise common_experts",
    ]
    with pytest.raises(ModelError, match=r"model.ffn.shared.vision: got 'film'; allowed 'image', 'video', 'text'"):
        check(OmniVL(ffn=MoMEConfig(shared={"vision": ("image", "film")})))


@pytest.mark.parametrize("kind", [LIMoEConfig, AttributeConfig])
def test_experts_stand_in_blocks_that_are_there(kind):
    check(OmniVL(ffn=kind(blocks=(0, -1))))
    with pytest.raises(ModelError) as caught:
        check(OmniVL(text_layers=6, ffn=kind(blocks=(3, 6, -7))))
    assert str(caught.value).splitlines() == [
        "model.ffn.blocks: got 6; allowed -6 to 5, the blocks of 6 text_layers; name another block or build more",
        "model.ffn.blocks: got -7; allowed -6 to 5, the blocks of 6 text_layers; name another block or build more",
    ]
    check(OmniVL(text_layers=0, generation_layers=0, ffn=kind(blocks=(3, -1))))  # a stack without blocks has no places
    with pytest.raises(ModelError) as caught:
        check(Unified(ffn=kind(blocks=(11, 2, -1))))
    assert str(caught.value) == (
        "model.ffn.blocks: got [11, 2, -1] with 12 depth; allowed each block once; take out those that are "
        "named from both ends"
    )


def test_experts_of_attention_stand_in_the_unified_transformer_alone():
    ffn = AttributeConfig(attention=True)
    check(Unified(ffn=ffn))
    with pytest.raises(ModelError) as caught:
        check(OmniVL(ffn=ffn))
    assert str(caught.value) == (
        "model.ffn.attention: got true in architecture 'omnivl'; allowed false there; set it to false, or model.kind "
        "to unified"
    )
    with pytest.raises(ModelError) as caught:
        check(Unified(multiway=True, ffn=ffn))
    assert str(caught.value) == (
        "model.ffn.attention: got true beside multiway; allowed one of the two; set one of the two to false"
    )


def test_details_of_the_visual_encoder_fit_what_stands_beside_them():
    vision = VisionConfig(activation="quick_gelu", relative_positions=True)
    with pytest.raises(ModelError) as caught:
        check(OmniVL(vision=vision, patch_dropout=0.5, ffn=LIMoEConfig()))
    assert str(caught.value).splitlines() == [
        "model.vision.activation: got 'quick_gelu' with ffn kind 'limoe'; allowed 'gelu' where there are sparse or "
        "attribute experts; set it to 'gelu', or model.ffn.kind to 'dense' or 'mome'",
        "model.vision.relative_positions: got true with patch_dropout 0.5; allowed false, or true with patch_dropout "
        "0; change either",
    ]


def test_time_positions():
    assert OmniVL(tubelet_size=2).inputs.time_positions(8) == 4
    assert OmniVL(tubelet_size=2).inputs.time_positions(1) == 1
