"""METER: parity with transformers' modules, where it starts from, sizes, what no loss reads, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_meter import MERGED, OBJECTIVES, SMALL, TOKENS, Peer, meter_batch, prepared
from small_towers import scattered

from moe.config import LIMoEConfig
from omnivl.architectures import METER
from omnivl.architectures.base import check
from omnivl.architectures.build import build_chain
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.state import State
from omnivl.errors import ModelError
from omnivl.objectives import ITM, MLM, MMM, VLM
from omnivl.objectives.codes import RandomCodebook
from omnivl.parts import attention
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import MomentumConfig
from omnivl.pretrained.load import load_pretrained

PIXELS = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
BOTH = pytest.mark.parametrize("config", [SMALL, MERGED], ids=["co", "merged"])
MASKED = MMM(probability=0.5, replaced=0.4, min_block=1, codebook=RandomCodebook(num_codes=11, width=3))


def loaded(peer: Peer, folder: Path, config: METER):
    """A chain with a peer's weights: encoders through files on disk."""
    chain = build_chain(config, (), TOKENS)
    for part in ("vision", "text"):
        getattr(peer, part).save_pretrained(folder / part)
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    reports = [load_pretrained(chain, config, folder / part, part=part) for part in ("vision", "text")]
    own = peer.of_fusion(dict(peer.named_parameters()))
    with torch.no_grad():
        for name, tensor in own.items():
            chain.get_parameter(name).copy_(tensor)
    found = {name for report in reports for name in report.matched} | own.keys()
    assert found == {name for name, _ in chain.named_parameters()} - {"embed.block.visual.mask_token"}
    return chain


def before_losses(chain, batch) -> State:
    """The state that losses would read of pairs of which everything is read."""
    demands = Demands(joins={"all": Join()}, reads=frozenset({"fused_visual", "pooled"}))
    state = State.from_batch(batch, lay_out({"all": demands}, "image_text", batch.size, 1, "predict"))
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


@BOTH
def test_streams_and_gradients_equal_transformers_modules(config, tmp_path):
    torch.manual_seed(0)
    peer = Peer(config)
    chain, batch = loaded(peer, tmp_path, config), meter_batch()
    state, places = before_losses(chain, batch), batch.token_ids != TOKENS.pad
    text, visual, pooled = peer(batch.frames, batch.token_ids)
    read = [
        (state.rows("fused", "all")[places], text[places]),
        (state.rows("fused_visual", "all"), visual),
        (state.pooled("all"), pooled),
    ]
    for one, other in read:
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    directions = [torch.randn_like(one) for one, _ in read]
    for side in (0, 1):
        sum((pair[side] * direction).sum() for pair, direction in zip(read, directions, strict=True)).backward()
    theirs = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in peer.named_parameters()}
    wanted = peer.of_fusion(theirs)
    for part in ("vision", "text"):
        given = {name.removeprefix(f"{part}."): one for name, one in theirs.items() if name.startswith(f"{part}.")}
        if part == "vision":
            given = {
                name if name.startswith("vision_model.") else f"vision_model.{name}": one for name, one in given.items()
            }
        wanted |= config.from_foreign(given, tmp_path / part)
    for name, parameter in chain.named_parameters():
        if name == "embed.block.visual.mask_token":
            continue
        if name == "embed.block.text.positions":  # there its gradient and that of the token type are two
            wanted[name] = wanted[name] - theirs["text.embeddings.token_type_embeddings.weight"][0]
        torch.testing.assert_close(parameter.grad, wanted[name].view_as(parameter), rtol=3e-4, atol=5e-5, msg=name)


def test_weights_that_ask_for_other_options_are_refused(tmp_path):
    peer = Peer(SMALL)
    for part, other, message in (
        (
            "vision",
            {"vision": replace(SMALL.vision, activation="gelu")},
            "model.vision.activation: got 'gelu'; allowed 'quick_gelu' with these weights",
        ),
        (
            "text",
            {"text": replace(SMALL.text, num_heads=2)},
            "model.text.num_heads: got 2; allowed 3 with these weights",
        ),
    ):
        getattr(peer, part).save_pretrained(tmp_path / part)
        config = replace(SMALL, **other)
        with pytest.raises(ModelError, match=message):
            load_pretrained(build_chain(config, (), TOKENS), config, tmp_path / part, part=part)


@pytest.mark.parametrize("objectives", [OBJECTIVES, (MLM(),), (MASKED,), (ITM(),)], ids=["both", "words", "mmm", "wpa"])
@BOTH
def test_what_no_loss_reads_is_idle(config, objectives):
    torch.manual_seed(0)
    chain, batch = scattered(build_chain(config, objectives, TOKENS)), meter_batch(objectives)
    layout = plan_layout(objectives, "image_text", 4, 1)
    chain(State.from_batch(batch, layout))["loss"].backward()
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([layout])}
    for name, one in chain.named_parameters():
        assert (one.grad is None) == (id(one) in idle), name


@pytest.mark.parametrize("objectives", [OBJECTIVES, (MLM(),)], ids=["both", "words"])
@BOTH
def test_operations_are_what_torch_counts(monkeypatch, config, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    batch = meter_batch(objectives)
    full = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == TOKENS.pad, 7), prepared={})
    full = prepared(full, objectives)
    chain, layout = build_chain(config, objectives, TOKENS), plan_layout(objectives, "image_text", 4, 1)
    with FlopCounterMode(display=False) as counter:
        chain(State.from_batch(full, layout))["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout, 4 * 7), rel=0.05)


@BOTH
def test_padding_of_texts_changes_nothing(config):
    torch.manual_seed(0)
    chain, batch = scattered(build_chain(config, OBJECTIVES, TOKENS)).eval(), meter_batch()
    with torch.no_grad():
        before = before_losses(chain, batch)
        words = chain.embed.block.text.words
        words[TOKENS.pad] += 1.0
        after = before_losses(chain, batch)
    torch.testing.assert_close(after["pooled"], before["pooled"])
    torch.testing.assert_close(after["fused_visual/all"], before["fused_visual/all"])


def test_sizes_are_those_of_the_released_model():
    """Twelve blocks of 9.45 M, six for each modality: 113.42 M; CLIP-B/16 with 11 blocks; RoBERTa-base."""
    with torch.device("meta"):
        chain = build_chain(METER(), OBJECTIVES, TOKENS)
        merged = build_chain(METER(attention="merged", fusion=replace(METER().fusion, layers=12)), OBJECTIVES, TOKENS)

    def count(of, *beginnings):
        return sum(one.numel() for name, one in of.named_parameters() if name.startswith(beginnings))

    assert count(chain, *(f"fused_0{index}" for index in range(6))) == 12 * 9_451_776 == 113_421_312
    assert count(merged, *(f"fused_{index:02d}" for index in range(12))) == 12 * 7_087_872
    assert count(chain, "fused_pool") == 2 * 768 * 769
    # RoBERTa-base: 124,645,632; without its pooler, the 514 - 50 positions that no text has, and the token type.
    assert count(chain, "embed.block.text", "text_") == 124_645_632 - 768 * 769 - (514 - 50) * 768 - 768
    # CLIP's ViT-B/16 of 224 pixels has 85,799,424 before its projection; one block less, 18 x 18 patches.
    visual = count(chain, "embed.block.visual", "visual_") - 768
    assert visual == 85_799_424 - 7_087_872 + (18 * 18 - 14 * 14) * 768


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision": replace(SMALL.vision, norm="post")},
            "model.vision.norm: got 'post'; allowed 'pre' in 'meter'; set it to 'pre'",
        ),
        (
            {"fusion": replace(SMALL.fusion, norm="pre")},
            "model.fusion.norm: got 'pre'; allowed 'post' in 'meter'; set it to 'post'",
        ),
        (
            {"fusion": replace(SMALL.fusion, ffn=LIMoEConfig())},
            "model.fusion.ffn.kind: got 'limoe'; allowed 'dense' in 'meter'; set it to 'dense'; "
            "vision and text may have experts",
        ),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'meter', which has none; set it to null",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError) as caught:
        check(replace(SMALL, **change))
    assert str(caught.value) == message


def test_objectives_on_streams_that_it_lacks_are_refused():
    with pytest.raises(ModelError, match="asks for the stream 'embedding'; architecture 'meter' has visual"):
        build_chain(SMALL, (VLM(),), TOKENS)
