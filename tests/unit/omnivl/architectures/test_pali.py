"""PaLI: losses, gradients and texts against transformers' T5, imports, sizes, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_clip import TOKENS
from small_pali import OBJECTIVES, SMALL, as_ours, pali_batch, peer, run, scattered, tell
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnivl.architectures import PaLI
from omnivl.architectures.base import check
from omnivl.architectures.build import build_chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.errors import ModelError
from omnivl.inference.generate import caption_search, generate
from omnivl.objectives import ITC, LM
from omnivl.objectives.lm import shift
from omnivl.parts import attention
from omnivl.parts.sizes import MomentumConfig
from omnivl.parts.t5 import buckets
from omnivl.pretrained.load import load_pretrained


def image_tokens(chain, frames):
    """The mapped patches of images, without the class token."""
    layers = chain.named_layers
    hidden = layers["embed"].block.visual(frames, torch.float32)
    for index in range(2):
        hidden = layers[f"visual_{index:02d}"].block(hidden, 1, False).y
    hidden = layers["visual_norm"].block(hidden)
    return layers["visual_map"].block(hidden[:, 1:])


def inputs_of(model, chain, frames, beginning):
    """Image tokens and words as the class takes them, images first, and which of them are no padding."""
    image = image_tokens(chain, frames)
    seen = torch.cat([torch.ones(image.shape[:2], dtype=torch.bool), beginning != TOKENS.pad], dim=1)
    return {"inputs_embeds": torch.cat([image, model.shared(beginning)], dim=1), "attention_mask": seen.long()}


@pytest.mark.parametrize("cls", ["T5", "MT5"])
def test_loss_and_gradients_are_those_of_transformers(cls):
    model, chain, batch = peer(cls), scattered(), pali_batch()
    tell(chain, model)
    prepared = batch.prepared
    inputs = inputs_of(model, chain, batch.frames, prepared["split_lm/beginning/token_ids"])
    logits = model(**inputs, decoder_input_ids=prepared["split_lm/token_ids"]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), prepared["split_lm/targets"].flatten(), ignore_index=-100)
    wanted.backward()
    of_tower = {name: one.grad.clone() for name, one in chain.named_parameters() if one.grad is not None}
    chain.zero_grad()
    got = run(chain, batch)["loss"]
    torch.testing.assert_close(got, wanted)
    got.backward()
    theirs = as_ours({name: one.grad for name, one in model.named_parameters()})
    assert theirs.keys().isdisjoint(of_tower)
    assert theirs.keys() | of_tower.keys() == dict(chain.named_parameters()).keys()
    for name, gradient in (theirs | of_tower).items():
        torch.testing.assert_close(chain.get_parameter(name).grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_buckets_are_those_of_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    for both_ways in (True, False):
        wanted = T5Attention._relative_position_bucket(distance, both_ways, num_buckets=32, max_distance=128)
        assert torch.equal(buckets(distance, both_ways=both_ways), wanted)


BEGINNING = torch.tensor([[TOKENS.cls, 7, 8, TOKENS.sep, 0, 0, 0, 0]] * 4)


def test_greedy_words_are_those_that_transformers_generates():
    model, chain, batch = peer().eval(), scattered().eval(), pali_batch()
    tell(chain, model)
    banned = [one for one in range(TOKENS.num_reserved) if one != TOKENS.sep]
    with torch.no_grad():
        inputs = inputs_of(model, chain, batch.frames, BEGINNING)
        # Its cache would have as many layers as the encoder.
        options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": banned, "use_cache": False}
        wanted = model.generate(**inputs, **options)[:, 1:]
    made = generate(chain, "split_lm", batch.frames, caption_search(TOKENS, 6), token_ids=BEGINNING).token_ids
    torch.testing.assert_close(made[:, : wanted.shape[1]], wanted)


def test_beams_with_and_without_a_cache_are_the_same():
    chain, batch = scattered().eval(), pali_batch()
    made = [
        generate(chain, "split_lm", batch.frames, caption_search(TOKENS, 6, 3), token_ids=BEGINNING, cached=cached)
        for cached in (True, False)
    ]
    torch.testing.assert_close(made[0].token_ids, made[1].token_ids)
    torch.testing.assert_close(made[0].log_probability, made[1].log_probability)


def test_a_folder_of_the_class_loads(tmp_path):
    for cls in ("T5", "MT5"):
        model, chain = peer(cls), scattered()
        model.save_pretrained(tmp_path / cls)
        report = load_pretrained(chain, SMALL, tmp_path / cls)
        theirs = as_ours(dict(model.named_parameters()))
        assert set(report.matched) == theirs.keys()
        assert report.unexpected == ()
        assert all(name.startswith(("embed.block.visual", "visual_")) for name in report.missing)
        for name, tensor in theirs.items():
            assert torch.equal(chain.get_parameter(name), tensor), name


def test_a_head_that_a_file_leaves_out_is_the_table_of_words(tmp_path):
    model, chain = peer(), scattered()
    model.lm_head.weight = model.shared.weight
    model.save_pretrained(tmp_path)
    load_pretrained(chain, SMALL, tmp_path)
    assert torch.equal(chain.get_parameter("losses.vocabulary.decoder.weight"), model.shared.weight)


def test_a_vit_starts_the_image_encoder(tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    eps = {"layer_norm_eps": SMALL.vision.norm_eps}
    model = ViTModel(ViTConfig(**sizes, **eps, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    chain, frames = scattered().eval(), pali_batch().frames
    report = load_pretrained(chain, SMALL, tmp_path, part="vision")
    assert set(report.missing) == {"visual_map.block.weight", "visual_map.block.bias"}
    with torch.no_grad():
        wanted = model(frames[:, 0] / 127.5 - 1).last_hidden_state[:, 1:]
        torch.testing.assert_close(image_tokens(chain, frames), chain.named_layers["visual_map"].block(wanted))


def test_weights_that_ask_for_other_options_are_refused(tmp_path):
    peer("T5").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    changed = {"feed_forward_proj": "relu", "scale_decoder_outputs": True, "relative_attention_max_distance": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    other = replace(SMALL, encoder=replace(SMALL.encoder, num_heads=5), head_size=2)
    with pytest.raises(ModelError) as caught:
        load_pretrained(scattered(other), other, tmp_path)
    form = "in 'pali', whose form is that of T5 v1.1; set it, or give other weights"
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: model.encoder.num_heads: got 5; allowed 2 with these weights; set it, or give other weights",
        f"{tmp_path}: model.head_size: got 2; allowed 5 with these weights; set it, or give other weights",
        f"{tmp_path}: config.json, feed_forward_proj: got 'relu'; allowed 'gated-gelu' {form}",
        f"{tmp_path}: config.json, scale_decoder_outputs: got True; allowed False {form}",
        f"{tmp_path}: config.json, relative_attention_max_distance: got 64; allowed 128 {form}",
    ]


def test_operations_are_what_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain, batch = scattered(), pali_batch()
    whole = torch.tensor([[1, *range(5, 11), 49]] * 4)
    inputs, targets = shift(whole, TOKENS)  # nothing is padded, neither beginnings nor ends
    prepared = {"split_lm/beginning/token_ids": whole, "split_lm/token_ids": inputs, "split_lm/targets": targets}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(chain, replace(batch, prepared=prepared))["loss"].backward()
    counted = chain_flops(chain, plan_layout(OBJECTIVES, "image_text", 4, 1), 4 * 8)
    assert counter.get_total_flops() == pytest.approx(counted, rel=3e-3)


def test_all_parameters_learn():
    chain, batch = scattered(), pali_batch()
    run(chain, batch)["loss"].backward()
    layout = plan_layout(OBJECTIVES, "image_text", 4, 1)
    assert not [one for layer in chain.layers for one in layer.idle_parameters([layout])]
    assert all(one.grad is not None for one in chain.parameters())


@pytest.mark.parametrize("recompute", ["attention", "ffn", "block"])
def test_recomputed_activations_give_the_same_gradients(recompute):
    plain, batch = scattered(), pali_batch()
    again = scattered(SMALL.recomputing(recompute))
    again.load_state_dict(plain.state_dict())
    for chain in (plain, again):
        run(chain, batch)["loss"].backward()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize(
    ("preset", "image", "text"), [("3b", 1.84e9, 1.23e9), ("15b", 1.84e9, 12.92e9), ("17b", 3.80e9, 12.92e9)]
)
def test_sizes_are_those_that_are_published(preset, image, text):
    """ViT-e's blocks 3.80 billion, mT5-XXL 12.92 billion with its head."""
    with torch.device("meta"):
        chain = build_chain(PaLI.presets[preset], OBJECTIVES, TOKENS)
    sizes = {name: one.numel() for name, one in chain.named_parameters()}
    tower = sum(size for name, size in sizes.items() if name.startswith("visual_") and "map" not in name)
    own = ("embed.block.text", "fused", "generation", "losses")
    assert tower == pytest.approx(image, rel=0.005)
    assert sum(size for name, size in sizes.items() if name.startswith(own)) == pytest.approx(text, rel=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 44}, "model.image_size: got 44; allowed a multiple of patch_size 8; change either"),
        (
            {"decoder": replace(SMALL.decoder, hidden_size=24)},
            "model.decoder.hidden_size: got 24; allowed encoder.hidden_size 12; make them equal",
        ),
        (
            {"encoder": replace(SMALL.encoder, activation="relu")},
            "model.encoder.activation: got 'relu'; allowed 'gelu' in 'pali', whose perceptrons are gated; "
            "set it to 'gelu'",
        ),
        (
            {"sizes": "native"},
            "model.sizes: got 'native'; allowed 'fixed' or 'stretched' in 'pali'; set it to 'fixed'",
        ),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'pali', which has none; set it to null",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError) as caught:
        check(replace(SMALL, **change))
    assert str(caught.value) == message


def test_what_looks_at_images_alone_is_refused():
    with pytest.raises(ModelError, match="asks for the stream 'embedding'; architecture 'pali' has visual, fused"):
        build_chain(SMALL, (ITC(),), TOKENS)
    objectives = (LM(),)
    with pytest.raises(ModelError, match="architecture 'pali': got 'lm', whose decoder looks at images"):
        run(scattered(objectives=objectives), pali_batch(objectives), objectives)
