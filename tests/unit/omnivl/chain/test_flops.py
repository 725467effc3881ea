"""Operations computed by layers against those that torch counts."""

from dataclasses import replace

import pytest
import torch

from engine.step.freeze import freeze
from moe.config import AttributeConfig, DenseConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.routers import TokenChoice
from omnivl.architectures import OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.backward import FORWARD_AND_BACKWARD
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import StepLayout
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MDM, MLM, MRM, VLM, Classify, UniVLC
from omnivl.parts import attention

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


def step_flops(config, layout, objectives=(), text_tokens=None):
    with torch.device("meta"):
        chain = build_chain(config, objectives, TOKENS)
    return chain_flops(chain, layout, text_tokens)


FILLINGS = {
    "mome": MoMEConfig(fusion_from=1),
    "mome sharing": MoMEConfig(shared={"vision": ("image", "video")}),
    "limoe": LIMoEConfig(
        num_experts=4, router=TokenChoice(top_k=2), shared_experts=1, expert_ratio=0.5, implementation="loop"
    ),
    "limoe everywhere": LIMoEConfig(num_experts=4, every=1, implementation="loop"),
    "limoe at named blocks": LIMoEConfig(num_experts=4, blocks=(0, -1), implementation="loop"),
    "attribute": AttributeConfig(num_experts=4),
    "attribute at a named block": AttributeConfig(num_experts=4, blocks=(-2,)),
    "mome_limoe": MoMELIMoEConfig(pools={"image": 2, "text": 3}, common_experts=1, implementation="loop"),
}


@pytest.mark.parametrize("objectives", [(UniVLC(),), (UniVLC(), VLM())])
@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_step_flops_of_the_unified_transformer_are_what_torch_counts(monkeypatch, kind, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.state import State

    config = replace(Unified.presets["tiny"], vocab_size=100, projection_size=1)
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = build_chain(config, objectives, TOKENS)
    frames = 8 if kind == "video_text" else 1
    layout = plan_layout(objectives, kind, 2, frames)
    own = torch.arange(2)
    batch = {
        **{"frames": torch.zeros(2, frames, 3, 64, 64, dtype=torch.uint8), "vlm/uniforms": torch.rand(2, 2)},
        **{"token_ids": torch.ones(2, 16, dtype=torch.int64), "identity": own, "label": own, "position": own},
    }
    with FlopCounterMode(display=False) as counter:
        chain(State(batch, layout))["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout), rel=1e-3)


def test_step_flops_of_one_image_by_hand():
    config = replace(
        OmniVL.presets["tiny"], hidden_size=4, mlp_ratio=2.0, num_heads=1, vision_layers=1, image_size=16, patch_size=8
    )
    layout = StepLayout("image_text", 3, 1, visual={"clean": slice(0, 3)})
    # 4 patches and the class token: 5 positions of width 4, inner size 8.
    # projections 5 x 8 x 16 = 640; attention 4 x 5 x 5 x 4 = 400; feed-forward 5 x 4 x 4 x 8 = 640: 1,680 forward.
    # patches: 4 x 2 x 192 x 4 = 6,144 forward, twice in all because pixels get no gradient.
    assert step_flops(config, layout) == 3 * (3 * 1680 + 2 * 6144)


@pytest.mark.parametrize("ffn", [DenseConfig(), *FILLINGS.values()], ids=["dense", *FILLINGS])
def test_step_flops_counts_what_torch_counts(monkeypatch, ffn):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.state import State

    config = replace(OmniVL.presets["tiny"], vocab_size=100, projection_size=1, ffn=ffn)
    objectives = (UniVLC(),)
    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = build_chain(config, objectives, TOKENS)
    for kind, frames in (("image_text", 1), ("video_text", 8)):
        layout = plan_layout(objectives, kind, 2, frames)
        own = torch.arange(2)
        batch = {
            "frames": torch.zeros(2, frames, 3, 64, 64, dtype=torch.uint8),
            "token_ids": torch.ones(2, 16, dtype=torch.int64),
            "identity": own,
            "label": own,
            "position": own,
        }
        with FlopCounterMode(display=False) as counter:
            chain(State(batch, layout))["loss"].backward()
        assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout), rel=1e-3)


@pytest.mark.parametrize(
    ("frozen", "tolerance"),
    [
        ([], 1e-3),
        (["visual_*", "embed.block.visual"], 1e-3),  # no gradient reaches the blocks
        (["text_*", "embed.block.text"], 1e-3),
        (["visual_*", "text_*"], 0.05),  # it passes through, where attention's own products count once instead of twice
    ],
)
def test_what_is_frozen_counts_what_torch_counts(monkeypatch, frozen, tolerance):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.state import State

    config = replace(OmniVL.presets["tiny"], vocab_size=100, projection_size=1, vision_layers=2)
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = build_chain(config, (UniVLC(),), TOKENS)
    freeze(chain, frozen, "freeze")
    layout, own = plan_layout((UniVLC(),), "image_text", 2, 1), torch.arange(2)
    batch = {
        "frames": torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8),
        "token_ids": torch.ones(2, 16, dtype=torch.int64),
        **dict.fromkeys(("identity", "label", "position"), own),
    }
    with FlopCounterMode(display=False) as counter:
        chain(State(batch, layout))["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout), rel=tolerance)


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("objectives", [(UniVLC(),), (LM(),), (UniVLC(), VLM(), LM())])
def test_padding_and_dropped_patches_count_as_torch_counts(monkeypatch, kind, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.state import State
    from omnivl.data.batch import Batch
    from omnivl.objectives import PrepareContext

    # 64 patches of an image or frame, of which 64 * 0.7 = 44.8, so 45, are kept.
    config = replace(OmniVL.presets["tiny"], vocab_size=100, projection_size=1, patch_dropout=0.3)
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = build_chain(config, objectives, TOKENS).train()
    frames, own = 8 if kind == "video_text" else 1, torch.arange(2)
    token_ids = torch.zeros(2, 16, dtype=torch.int64)
    token_ids[0, :5] = torch.tensor([1, 7, 8, 9, 2])
    token_ids[1, :8] = torch.tensor([1, 7, 8, 9, 10, 11, 12, 2])
    batch = Batch(kind, torch.zeros(2, frames, 3, 64, 64, dtype=torch.uint8), token_ids, own, own, own)
    context = PrepareContext(0, "test", TOKENS, (8, 8), 0)
    prepared = {name: tensor for o in objectives for name, tensor in o.prepare(batch, context).items()}
    layout = plan_layout(objectives, kind, 2, frames)
    with FlopCounterMode(display=False) as counter:
        chain(State.from_batch(replace(batch, prepared=prepared), layout))["loss"].backward()
    counted = chain_flops(chain, layout, text_tokens=5 + 8)
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-3)
    whole = step_flops(replace(config, patch_dropout=0.0), layout, objectives)
    assert counted < chain_flops(chain, layout) < whole


@pytest.mark.parametrize("kind", ["image_text", "video"])
@pytest.mark.parametrize("unified", [False, True])
def test_names_of_a_list_count_as_torch_counts(monkeypatch, unified, kind):
    """Three names beside two pairs, or alone; in blocks that leave padding out without theirs."""
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.state import State

    config = replace(OmniVL.presets["tiny"], vocab_size=100, projection_size=1)
    config = Unified.like(config) if unified else config
    objectives = (Classify(names=("ox", "cat", "bee")), *((UniVLC(),) if kind == "image_text" else ()))
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain, own = build_chain(config, objectives, TOKENS), torch.arange(2)
    layout = plan_layout(objectives, kind, 2, 8 if kind == "video" else 1)
    names = torch.full((3, 16), 7)
    if not unified:
        names[0, 4:] = names[1, 5:] = names[2, 6:] = TOKENS.pad
    read = int((names != TOKENS.pad).sum())
    batch = {
        **{"frames": torch.zeros(2, layout.num_frames, 3, 64, 64, dtype=torch.uint8), "classify/targets": own},
        **{"token_ids": torch.ones(2, 16, dtype=torch.int64), "identity": own, "label": own, "position": own},
        "classify/names/token_ids": names,
    }
    if kind == "video":
        del batch["token_ids"]
    with FlopCounterMode(display=False) as counter:
        chain(State(batch, layout))["loss"].backward()
    pairs = 2 * 16 if kind == "image_text" else 0
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout, pairs, read), rel=1e-3)
    assert chain_flops(chain, layout, pairs, 3 * 16) == pytest.approx(chain_flops(chain, layout))


def test_masked_passes_and_inference_keep_all_patches():
    whole, dropping = OmniVL.presets["tiny"], replace(OmniVL.presets["tiny"], patch_dropout=0.5)
    for layout in (
        StepLayout("image_text", 3, 1, visual={"clean": slice(0, 3), "mrm": slice(3, 6)}),
        StepLayout("image_text", 3, 1, mode="encode", visual={"clean": slice(0, 3)}),
    ):
        assert step_flops(dropping, layout) == step_flops(whole, layout)
    clean = StepLayout("image_text", 3, 1, visual={"clean": slice(0, 3)})
    assert step_flops(dropping, clean) < 0.55 * step_flops(whole, clean)


def test_passes_of_a_layer_add_up_to_the_step():
    config = replace(Unified.presets["tiny"], vocab_size=100)
    objectives = (UniVLC(), VLM())
    with torch.device("meta"):
        chain = build_chain(config, objectives, TOKENS)
    apart, joined = (plan_layout(some, "image_text", 2, 1) for some in (objectives[:1], objectives))
    block = chain.unified_00
    first, second = (block.flops(joined, None, number) for number in (0, 1))
    assert (block.flops(apart, None, 0), block.flops(apart, None, 1)) == (first, 0.0)
    # Joined rows are three for a pair, each as long as both sides together.
    assert second > 3 * first
    assert chain_flops(chain, joined) - chain_flops(chain, apart) == config.depth * second


def test_twins_count_forward_only():
    config = replace(OmniVL.presets["tiny"], vocab_size=100)
    still, moving = (UniVLC(),), (UniVLC(queue_size=8),)
    alone, both = (plan_layout(objectives, "image_text", 2, 1) for objectives in (still, moving))
    online = step_flops(config, alone, still)
    with torch.device("meta"):
        embed = build_chain(config, moving, TOKENS).embed
    patches = embed.flops(alone, None) / (FORWARD_AND_BACKWARD - 1)  # no gradient flows into pixels
    twins = (online - embed.flops(alone, None)) / FORWARD_AND_BACKWARD + patches
    assert step_flops(config, both, moving) - online == pytest.approx(twins)


def test_the_vocabulary_head_counts_on_hidden_words():
    config = replace(OmniVL.presets["tiny"], hidden_size=8, num_heads=1, vocab_size=100, text_length=10)
    for objectives, unified, words in (
        ((MLM(grounded=False, probability=0.2),), False, 0.2),
        ((MDM(text_probability=0.1, pair_text_probability=0.4),), True, 0.1 + 0.4),
        ((MRM(),), False, 0.0),
    ):
        with torch.device("meta"):
            chain = build_chain(Unified.like(config) if unified else config, objectives, TOKENS)
        layout = plan_layout(objectives, "image_text", 3, 1)
        one = 2 * 8 * (8 + 100)
        assert chain.losses.flops(layout, 5.0) == pytest.approx(FORWARD_AND_BACKWARD * 3 * 5 * words * one)
        assert chain.losses.flops(layout, None) == pytest.approx(FORWARD_AND_BACKWARD * 3 * 10 * words * one)


def test_operations_do_not_depend_on_what_is_left_here_of_parameters():
    objectives = (UniVLC(queue_size=8), VLM(), MLM(), LM())
    config = replace(OmniVL.presets["tiny"], vocab_size=100, ffn=FILLINGS["limoe everywhere"])
    with torch.device("meta"):
        chain = build_chain(config, objectives, TOKENS)
    layout = plan_layout(objectives, "video_text", 2, 8)
    before = chain_flops(chain, layout, 11)
    for parameter in chain.parameters():
        parameter.data = torch.empty(0, device="meta")
    assert chain_flops(chain, layout, 11) == before > 0
