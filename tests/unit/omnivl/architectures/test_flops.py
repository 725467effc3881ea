"""Counts by arithmetic against built modules."""

from dataclasses import replace

import pytest
import torch

from moe.config import AttributeConfig, DenseConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.routers import TokenChoice
from omnivl.architectures.build import build_chain
from omnivl.architectures.flops import parameter_count, step_flops
from omnivl.architectures.presets import PRESETS
from omnivl.chain.state import StepLayout
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MCM, MDM, MFM, MLM, MRM, VLM, UniVLC
from omnivl.parts import attention

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)
EVERYTHING = (MLM(), MRM(), MFM(), MCM(targets="momentum"), UniVLC(queue_size=8), VLM(), LM())


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("objectives", [(), EVERYTHING])
def test_parameter_count_is_that_of_the_built_chain(preset, objectives):
    config = PRESETS[preset]
    with torch.device("meta"):
        chain = build_chain(config, objectives, TOKENS)
    count = parameter_count(config, objectives)
    parameters = dict(chain.named_parameters())
    assert count.total == sum(p.numel() for p in parameters.values())
    assert count.momentum == sum(p.numel() for name, p in parameters.items() if "momentum_" in name)
    parts = {"embed.block", "visual", "text", "contrast", "alignment", "generation", "losses"}
    for part in parts:
        mine = {name: p for name, p in parameters.items() if name.startswith(part) and "momentum_" not in name}
        field = {"embed.block": "embed", "losses": "heads"}.get(part, part)
        assert getattr(count, field) == sum(p.numel() for p in mine.values()), part


def test_parameter_count_with_tubelets_and_layer_scale():
    config = replace(PRESETS["tiny"], tubelet_size=2, layer_scale_init=0.1)
    with torch.device("meta"):
        chain = build_chain(config, EVERYTHING, TOKENS)
    assert parameter_count(config, EVERYTHING).total == sum(p.numel() for p in chain.parameters())


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


@pytest.mark.parametrize("ffn", FILLINGS.values(), ids=FILLINGS)
def test_parameter_count_with_experts(ffn):
    config = replace(PRESETS["tiny"], ffn=ffn)
    with torch.device("meta"):
        chain = build_chain(config, EVERYTHING, TOKENS)
    assert parameter_count(config, EVERYTHING).total == sum(p.numel() for p in chain.parameters())


@pytest.mark.parametrize("multiway", [False, True])
@pytest.mark.parametrize("ffn", [DenseConfig(), *FILLINGS.values()], ids=["dense", *FILLINGS])
def test_parameter_count_of_the_unified_transformer(ffn, multiway):
    config = replace(PRESETS["tiny"], architecture="unified", ffn=ffn, multiway=multiway, layer_scale_init=0.1)
    objectives = (*(objective for objective in EVERYTHING if not isinstance(objective, LM)), MDM())
    with torch.device("meta"):
        chain = build_chain(config, objectives, TOKENS)
    count = parameter_count(config, objectives)
    assert count.total == sum(p.numel() for p in chain.parameters())
    assert count.momentum == sum(p.numel() for name, p in chain.named_parameters() if "momentum_" in name)


def test_parameter_count_with_experts_in_attention():
    ffn = AttributeConfig(num_experts=4, attention=True, blocks=(0, -1))
    config = replace(PRESETS["tiny"], architecture="unified", ffn=ffn)
    with torch.device("meta"):
        chain = build_chain(config, (UniVLC(),), TOKENS)
    assert parameter_count(config, (UniVLC(),)).total == sum(p.numel() for p in chain.parameters())


@pytest.mark.parametrize("objectives", [(UniVLC(),), (UniVLC(), VLM())])
@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_step_flops_of_the_unified_transformer_are_what_torch_counts(monkeypatch, kind, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.layout import plan_layout
    from omnivl.chain.state import State

    config = replace(PRESETS["tiny"], architecture="unified", vocab_size=100, projection_size=1)
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
    assert counter.get_total_flops() == pytest.approx(step_flops(config, layout), rel=1e-3)


def test_base_has_the_sizes_of_vit_b_and_bert_base():
    count = parameter_count(PRESETS["base"])
    # ViT-B/16 without its head is 85,798,656. Of it 197 x 768 + 768 + 590,592 are embeddings, leaving 85,056,000 for
    # 12 blocks and the last norm. The temporal parts add 12 x (2 x 768 + 5 x (768^2 + 768)).
    assert count.visual == 85_056_000 + 12 * (2 * 768 + 5 * (768**2 + 768))
    assert count.text == 85_054_464  # BertModel's encoder


def test_step_flops_of_one_image_by_hand():
    config = replace(
        PRESETS["tiny"], hidden_size=4, mlp_ratio=2.0, num_heads=1, vision_layers=1, image_size=16, patch_size=8
    )
    layout = StepLayout("image_text", 3, 1, visual={"clean": slice(0, 3)})
    # 4 patches and the class token: 5 positions of width 4, inner size 8.
    # projections 5 x 8 x 16 = 640; attention 4 x 5 x 5 x 4 = 400; feed-forward 5 x 4 x 4 x 8 = 640: 1,680 forward.
    # patches: 4 x 2 x 192 x 4 = 6,144 forward, twice in all because pixels get no gradient.
    assert step_flops(config, layout) == 3 * (3 * 1680 + 2 * 6144)


@pytest.mark.parametrize("ffn", [DenseConfig(), *FILLINGS.values()], ids=["dense", *FILLINGS])
def test_step_flops_counts_what_torch_counts(monkeypatch, ffn):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.layout import plan_layout
    from omnivl.chain.state import State

    config = replace(PRESETS["tiny"], vocab_size=100, projection_size=1, ffn=ffn)
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
        assert counter.get_total_flops() == pytest.approx(step_flops(config, layout), rel=1e-3)


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("objectives", [(UniVLC(),), (LM(),), (UniVLC(), VLM(), LM())])
def test_padding_and_dropped_patches_count_as_torch_counts(monkeypatch, kind, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    from omnivl.chain.layout import plan_layout
    from omnivl.chain.state import State
    from omnivl.data.batch import Batch
    from omnivl.objectives import PrepareContext

    # 64 patches of an image or frame, of which 64 * 0.7 = 44.8, so 45, are kept.
    config = replace(PRESETS["tiny"], vocab_size=100, projection_size=1, patch_dropout=0.3)
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
    counted = step_flops(config, layout, text_tokens=5 + 8)
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-3)
    assert counted < step_flops(config, layout) < step_flops(replace(config, patch_dropout=0.0), layout)


def test_masked_passes_and_inference_keep_all_patches():
    whole, dropping = PRESETS["tiny"], replace(PRESETS["tiny"], patch_dropout=0.5)
    for layout in (
        StepLayout("image_text", 3, 1, visual={"clean": slice(0, 3), "mrm": slice(3, 6)}),
        StepLayout("image_text", 3, 1, mode="encode", visual={"clean": slice(0, 3)}),
    ):
        assert step_flops(dropping, layout) == step_flops(whole, layout)
    clean = StepLayout("image_text", 3, 1, visual={"clean": slice(0, 3)})
    assert step_flops(dropping, clean) < 0.55 * step_flops(whole, clean)
