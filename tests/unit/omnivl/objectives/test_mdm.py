"""Masked data modelling: what each part hides, and its loss against one put together by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moe.config import MoMEConfig
from omnivl.architectures import OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError, UserError
from omnivl.objectives import MDM, MLM, MRM, VLM, PrepareContext, UniVLC
from omnivl.objectives.masked_visual import pixel_targets
from omnivl.parts.embed import pixel_values
from omnivl.parts.streams import Part, Stream

SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
CONFIG = Unified(
    **{"hidden_size": 16, "num_heads": 2, "depth": 2, "projection_size": 8},
    **{"image_size": 16, "video_size": 16, "patch_size": 4, "num_frames": 2, "text_length": 8, "vocab_size": 40},
    multiway=True,
    ffn=MoMEConfig(shared={"vision": ("image", "video")}, fusion_from=1),
)
PAIRS = {"image": Part("image", 17), "text": Part("text", 8)}


def batch_of(objectives, kind="image_text", size=3):
    draw = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (size, 1, 3, 16, 16), dtype=torch.uint8, generator=draw)
    token_ids = torch.randint(5, 40, (size, 8), generator=draw)
    token_ids[:, 0], token_ids[:, 6], token_ids[:, 7] = SPECIAL.cls, SPECIAL.sep, SPECIAL.pad
    own = torch.arange(size)
    batch = Batch(kind, frames, token_ids, own, own, own)
    context = PrepareContext(0, "test", SPECIAL, (4, 4), 0)
    prepared = {}
    for objective in objectives:
        prepared |= objective.prepare(batch, context)
    return replace(batch, prepared=prepared)


def state_of(objectives, config=CONFIG, kind="image_text"):
    torch.manual_seed(0)
    chain = build_chain(config, objectives, SPECIAL)
    batch = batch_of(objectives, kind)
    return chain, State.from_batch(batch, plan_layout(objectives, kind, batch.size, 1))


def test_each_part_hides_its_share() -> None:
    prepared = batch_of((MDM(pair_text_probability=1.0, mask_share=1.0, random_share=0.0),)).prepared
    # 40 % of 16 patches is 6.4, so 6.
    for segment in ("mdm/image", "mdm/pair"):
        assert prepared[f"{segment}/mask"].sum((1, 2)).tolist() == [6, 6, 6]
        assert prepared[f"{segment}/rows"].tolist() == [0, 1, 2]
    assert not torch.equal(prepared["mdm/image/mask"], prepared["mdm/pair/mask"])
    assert (prepared["mdm/pair/token_ids"] == SPECIAL.mask).sum(1).tolist() == [5, 5, 5]
    assert (prepared["mdm/text/token_ids"] == SPECIAL.mask).sum(1).max() < 5


def test_words_are_hidden_as_mlm_hides_them(make_batch, context) -> None:
    batch = make_batch(positions=tuple(range(2000)))
    prepared = MDM().prepare(batch, context)
    ordinary = 4 * 2000  # token_ids of make_batch: [CLS], four words, [SEP]
    for segment, share in (("mdm/text", 0.15 + 0.25 * 0.85**4), ("mdm/pair", 0.5 + 0.25 * 0.5**4)):
        # A text in which no word was drawn gets one: probability (1 - p)^4, a quarter of the words.
        hidden = prepared[f"{segment}/targets"] != -100
        assert hidden.sum() / ordinary == pytest.approx(share, abs=0.02)
        assert hidden.any(1).all()
        kept = prepared[f"{segment}/token_ids"] == batch.token_ids
        assert kept[~hidden].all()


def test_the_pair_part_needs_no_clean_rows() -> None:
    layout = plan_layout((MDM(),), "image_text", 3, 1)
    assert layout.visual == {"mdm/image": slice(0, 3), "mdm/pair": slice(3, 6)}
    assert layout.text == {"mdm/text": slice(0, 3), "mdm/pair": slice(3, 6)}
    assert layout.fused == {"mdm/pair": slice(0, 3)}
    assert layout.joins["mdm/pair"].seen == ("mdm/pair",)
    assert not layout.twins
    assert plan_layout((MDM(targets="momentum"),), "image_text", 3, 1).twins.keys() == {"visual"}


def test_labels_have_the_image_part_and_clips_none() -> None:
    layout = plan_layout((MDM(),), "image_label", 3, 1)
    assert layout.visual == {"mdm/image": slice(0, 3)}
    assert not layout.text
    assert not layout.fused
    assert MDM().demands("video_text", 3) is None


def run(chain, *streams):
    """The unified blocks and the last norm on streams, outside the chain."""
    for layer in (chain.unified_00, chain.unified_01):
        made, _ = layer.block(*streams)
        streams = [replace(stream, x=x) for stream, x in zip(streams, made, strict=True)]
    return [chain.unified_norm.block(stream.x, stream) for stream in streams]


@pytest.mark.parametrize("beside", [(), (UniVLC(), VLM(), MLM(), MRM())], ids=["alone", "among others"])
def test_the_loss_is_what_the_three_parts_give_by_hand(beside) -> None:
    objective = MDM(image_weight=0.5, text_weight=2.0, pair_weight=3.0)
    chain, state = state_of((*beside, objective))
    embed = chain.embed.block

    def visual(segment):
        patches = embed.visual.patches(pixel_values(state["frames"], 4, torch.float32), False)
        masked = torch.where(state[f"{segment}/mask"][..., None], embed.visual.mask_token, patches)[:, 0]
        first = (embed.visual.class_token + embed.visual.positions[0]).expand(3, 1, -1)
        return torch.cat([first, masked + embed.visual.positions[1:]], dim=1)

    def patch_loss(features, segment):
        mask = state[f"{segment}/mask"]
        predicted = chain.losses.heads["mdm"].output(features[:, 1:][mask[:, 0]])
        return F.mse_loss(predicted, pixel_targets(state["frames"], mask.flatten().nonzero()[:, 0], 4))

    def word_loss(features, segment):
        logits = chain.losses.vocabulary(features)
        return F.cross_entropy(logits.flatten(0, 1), state[f"{segment}/targets"].flatten(), ignore_index=-100)

    there = state["token_ids"] != SPECIAL.pad
    image, text = PAIRS["image"], PAIRS["text"]
    words_alone = embed.text(state["mdm/text/token_ids"], torch.float32)
    alone = run(chain, Stream(visual("mdm/image"), (image,)), Stream(words_alone, (text,), there))
    words = embed.text(state["mdm/pair/token_ids"], torch.float32)
    everywhere = torch.cat([there, torch.ones(3, 17, dtype=torch.bool)], dim=1)
    (joined,) = run(chain, Stream(torch.cat([words, visual("mdm/pair")], dim=1), (text, image), everywhere))
    parts = {
        "image": patch_loss(alone[0], "mdm/image"),
        "text": word_loss(alone[1], "mdm/text"),
        "pair_text": word_loss(joined[:, :8], "mdm/pair"),
        "pair_image": patch_loss(joined[:, 8:], "mdm/pair"),
    }
    out = chain(state)
    for name, value in parts.items():
        torch.testing.assert_close(out[f"metric/mdm/{name}"], value.detach())
    wanted = 0.5 * parts["image"] + 2.0 * parts["text"] + 3.0 * (parts["pair_text"] + parts["pair_image"])
    torch.testing.assert_close(out["loss/mdm"], wanted)


def test_each_part_teaches_the_experts_that_it_meets() -> None:
    """Images alone never meet words' weights, nor texts alone those of images; pairs meet all, above by fusion."""
    chain, state = state_of((MDM(),))
    chain(state)["loss"].backward()
    names = {
        name for name, parameter in chain.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    for expert in ("unified_00.block.ffn.experts.vision", "unified_00.block.ffn.experts.text"):
        assert f"{expert}.fc1.weight" in names
    assert "unified_01.block.ffn.experts.fusion.fc1.weight" in names
    assert {f"unified_norm.block.sides.{side}.weight" for side in ("vision", "language")} <= names
    assert {"losses.heads.mdm.output.weight", "losses.vocabulary.decoder.weight"} <= names
    chain, state = state_of((MDM(),), kind="image_label")
    chain(state)["loss"].backward()
    names = {name for name, parameter in chain.named_parameters() if parameter.grad is not None}
    assert "unified_00.block.ffn.experts.vision.fc1.weight" in names
    assert not any(part in name for name in names for part in ("text", "language", "fusion", "vocabulary"))


def test_words_of_a_pair_look_at_its_patches_and_back() -> None:
    chain, state = state_of((MDM(),))
    before = chain(state)
    other = state.merged({"frames": state["frames"].roll(1, 0)})
    metrics = chain(other)
    assert metrics["metric/mdm/text"] == before["metric/mdm/text"]
    assert metrics["metric/mdm/pair_text"] != before["metric/mdm/pair_text"]
    other = state.merged({"mdm/pair/token_ids": state["mdm/pair/token_ids"].roll(1, 0)})
    metrics = chain(other)
    assert metrics["metric/mdm/image"] == before["metric/mdm/image"]
    assert metrics["metric/mdm/pair_image"] != before["metric/mdm/pair_image"]


@pytest.mark.parametrize(
    "objectives", [(MDM(),), (MDM(targets="momentum"),), (MDM(), UniVLC(), VLM(negatives="global"))]
)
@pytest.mark.parametrize("kinds", [("image_text",), ("image_label",), ("image_label", "image_text")])
def test_idle_parameters_are_those_without_a_gradient(objectives, kinds) -> None:
    chain, _ = state_of(objectives)
    layouts = []
    for kind in kinds:
        _, state = state_of(objectives, kind=kind)
        layouts.append(state.layout)
        chain(state)["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters(layouts)}
    for name, parameter in chain.named_parameters():
        if parameter.requires_grad and not name.startswith("losses.heads.vlm"):
            assert (parameter.grad is None) == (id(parameter) in idle), name


def test_it_is_refused_with_towers() -> None:
    with pytest.raises(ModelError, match="objective 'mdm' asks for the stream 'fused_visual'; architecture"):
        build_chain(replace(OmniVL.presets["tiny"], vocab_size=40), (MDM(),), SPECIAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_probability": 1.0}, "objective mdm: image_probability must be above 0 and below 1, got 1.0"),
        ({"pair_text_probability": 0.0}, "objective mdm: pair_text_probability must be above 0 and at most 1, got 0.0"),
        ({"pair_weight": 0.0}, "objective mdm: pair_weight must be above 0, got 0.0"),
        ({"random_share": 0.3}, "objective mdm: random_share must be from 0 to 1 - mask_share = 0.2, got 0.3"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(UserError) as error:
        MDM(**options)
    assert str(error.value) == message
