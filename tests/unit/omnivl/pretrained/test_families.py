"""CLIP, BLIP and BEiT: parity with transformers' classes, forward and gradient, through files on disk."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_towers import CONFIG, SIZES, TOKENS, encoders, scattered
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitModel,
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from omnivl.architectures import Unified, VisionConfig
from omnivl.architectures.build import build_chain
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.objectives import LM, VLM, UniVLC
from omnivl.pretrained.load import load_pretrained
from omnivl.pretrained.names import translate

NEAR = {"rtol": 2e-5, "atol": 2e-5}
PIXELS = {"image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": 50, "max_position_embeddings": 9}
CLIP = replace(CONFIG, projection_size=8, vision=VisionConfig("quick_gelu", 1e-5, True))
BLIP = replace(CONFIG, projection_size=8, vision=VisionConfig(norm_eps=1e-5))
BEIT = replace(CONFIG, layer_scale_init=0.1, vision=VisionConfig(norm_eps=1e-12, relative_positions=True))
OBJECTIVES = (UniVLC(queue_size=4), VLM(), LM())


def frames_of(size=16, times=1):
    return torch.randint(0, 256, (2, times, 3, size, size), dtype=torch.uint8)


def normalised(frames, processor=None):
    if processor is None:
        return frames[:, 0].float() / 127.5 - 1.0
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (frames[:, 0].float() / 255 - mean) / std


def visual_of(chain, frames):
    layout = StepLayout("image_text", 2, 1, visual={"clean": slice(0, 2)})
    return encoders(chain, State({"frames": frames}, layout))["visual"]


def clip_model(**more):
    config = CLIPConfig(
        vision_config={**SIZES, **PIXELS},
        text_config={**SIZES, **WORDS, "bos_token_id": 1, "eos_token_id": 2},
        projection_dim=8,
        **more,
    )
    return scattered(CLIPModel(config))


def blip_config():
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 16}
    return BlipConfig(
        vision_config={**SIZES, **PIXELS},
        text_config={**SIZES, **WORDS, **still},
        image_text_hidden_size=8,
        projection_dim=8,
    )


def check_gradients(chain, peer, architecture, more_than):
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    translated = translate(gradients, architecture, ("text",)).tensors
    own = dict(chain.named_parameters())
    compared = 0
    for name, wanted in translated.items():
        if name in own and own[name].grad is not None:
            torch.testing.assert_close(own[name].grad, wanted[: len(own[name])], rtol=2e-4, atol=3e-5, msg=name)
            compared += 1
    assert compared > more_than


def test_clips_visual_tower_equals_transformers(tmp_path):
    torch.manual_seed(0)
    peer = clip_model()
    peer.save_pretrained(tmp_path)
    # Mean and deviation 0.5 as here, so that gradients of the patches compare as they are.
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    chain = build_chain(CLIP, OBJECTIVES, TOKENS)
    report = load_pretrained(chain, CLIP, tmp_path, part="vision")
    assert (report.architecture, report.unexpected, report.differences) == ("clip", ("logit_scale",), ())
    assert all(
        any(part in name for part in ("temporal.", "mask_token", "video_delta", "times")) for name in report.missing
    )
    frames = frames_of()
    own = visual_of(chain, frames)
    vision = peer.vision_model
    # Theirs normalises the class token alone behind the last block, ours all positions.
    wanted = vision.post_layernorm(vision(normalised(frames)).last_hidden_state)
    torch.testing.assert_close(own, wanted, **NEAR)
    embedding = chain.encode_visual(frames)
    theirs = peer.get_image_features(normalised(frames)).pooler_output
    torch.testing.assert_close(embedding, F.normalize(theirs, dim=-1), **NEAR)
    direction = torch.randn_like(own)
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    check_gradients(chain, peer, "clip", 30)
    assert torch.equal(chain.embed.momentum_block.visual.norm.weight, chain.embed.block.visual.norm.weight)


@pytest.mark.parametrize("saved", ["with its processor", "alone"])
def test_pixels_normalised_otherwise_are_folded_into_the_patches(tmp_path, saved):
    torch.manual_seed(1)
    peer = CLIPVisionModel(clip_model().config.vision_config).eval()
    peer.save_pretrained(tmp_path)
    processor = CLIPImageProcessor()
    if saved == "with its processor":
        processor = CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.3, 0.5])
        processor.save_pretrained(tmp_path)
    chain = build_chain(CLIP, (), TOKENS)
    report = load_pretrained(chain, CLIP, tmp_path)
    assert "embed.block.visual.patches.bias" in report.matched
    frames = frames_of()
    wanted = peer(normalised(frames, processor)).pooler_output
    torch.testing.assert_close(visual_of(chain, frames)[:, 0], wanted, **NEAR)


def test_blips_encoders_and_matching_blocks_equal_transformers(tmp_path):
    torch.manual_seed(2)
    peer = scattered(BlipForImageTextRetrieval(blip_config()))
    peer.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    chain = build_chain(BLIP, OBJECTIVES, TOKENS)
    report = load_pretrained(chain, BLIP, tmp_path)
    assert (report.architecture, report.unexpected) == ("blip", ())
    assert len(report.differences) == 1 and report.differences[0].startswith("the alignment decoder reads embeddings")
    assert not any(name.startswith(("alignment_", "text_", "contrast.")) for name in report.missing)
    frames, token_ids = frames_of(), torch.tensor([[1, 7, 8, 9, 2, 0], [1, 11, 2, 0, 0, 0]])
    mask = token_ids != 0
    layout = StepLayout("image_text", 2, 1, visual={"clean": slice(0, 2)}, text={"clean": slice(0, 2)})
    state = encoders(chain, State({"frames": frames, "token_ids": token_ids}, layout))
    image = peer.vision_model(normalised(frames)).last_hidden_state
    text = peer.text_encoder(token_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(state["visual"], image, **NEAR)
    torch.testing.assert_close(state["text"][mask], text[mask], **NEAR)
    itc = peer(token_ids, normalised(frames), attention_mask=mask.long(), use_itm_head=False).itm_score
    own = chain.encode_visual(frames) @ chain.encode_text(token_ids).t()
    torch.testing.assert_close(own, itc, **NEAR)
    # The alignment blocks on what BLIP's multimodal encoder reads: embeddings.
    x = chain.embed.block.text(token_ids, torch.float32)
    for layer in (chain.alignment_00, chain.alignment_01):
        x = layer.block(x, mask, state["visual"], None).y
    wanted = peer.text_encoder(
        token_ids, attention_mask=mask.long(), encoder_hidden_states=image, encoder_attention_mask=torch.ones(2, 5)
    ).last_hidden_state
    torch.testing.assert_close(x[mask], wanted[mask], **NEAR)
    torch.testing.assert_close(chain.losses.heads["vlm"](x[:, 0]), peer.itm_head(wanted[:, 0]), **NEAR)
    peer.zero_grad()
    direction = torch.randn_like(wanted[mask])
    (x[mask] * direction).sum().backward()
    (peer.text_encoder.encoder.layer[0].output.dense.weight.sum() * 0 + (wanted[mask] * direction).sum()).backward()
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    translated = {
        n: t for n, t in translate(gradients, "blip", ()).tensors.items() if n.startswith(("align", "visual_0"))
    }
    assert len(translated) == 2 * 20 + 2 * 12
    named = dict(chain.named_parameters())
    for name, gradient in translated.items():
        torch.testing.assert_close(named[name].grad, gradient, rtol=2e-4, atol=3e-5, msg=name)


def test_blips_captions_equal_transformers(tmp_path):
    torch.manual_seed(3)
    peer = scattered(BlipForConditionalGeneration(blip_config()))
    peer.save_pretrained(tmp_path)
    chain = build_chain(BLIP, OBJECTIVES, TOKENS)
    report = load_pretrained(chain, BLIP, tmp_path)
    assert report.unexpected == ()
    assert not any(name.startswith(("generation_", "losses.")) for name in report.missing)
    frames, token_ids = frames_of(), torch.tensor([[4, 7, 8, 9, 3, 6], [4, 11, 2, 12, 13, 5]])
    image = peer.vision_model(normalised(frames, CLIPImageProcessor())).last_hidden_state
    wanted = peer.text_decoder(
        token_ids, attention_mask=torch.ones(2, 6), encoder_hidden_states=image, reduction="none"
    ).logits
    x = chain.embed.block.text(token_ids, torch.float32)
    for layer in (chain.generation_00, chain.generation_01):
        x = layer.block(x, torch.ones(2, 6, dtype=torch.bool), visual_of(chain, frames), None).y
    own = chain.losses.vocabulary(x)
    torch.testing.assert_close(own, wanted, **NEAR)
    direction = torch.randn_like(own)
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    gradients = {name: p.grad for name, p in peer.text_decoder.named_parameters() if "word_embeddings" not in name}
    # Their word embedding and last map share one gradient.
    gradients = {f"text_decoder.{name}": gradient for name, gradient in gradients.items() if gradient is not None}
    named, compared = dict(chain.named_parameters()), translate(gradients, "blip", ()).tensors
    assert len(compared) > 40
    for name, gradient in compared.items():
        torch.testing.assert_close(named[name].grad, gradient[: len(named[name])], rtol=2e-4, atol=5e-5, msg=name)


def test_what_blip_has_twice_is_taken_once_and_said(tmp_path):
    torch.manual_seed(4)
    peer = scattered(BlipForQuestionAnswering(blip_config()))
    peer.save_pretrained(tmp_path)
    chain = build_chain(BLIP, OBJECTIVES, TOKENS)
    report = load_pretrained(chain, BLIP, tmp_path)
    assert set(report.unexpected) == {
        f"text_decoder.bert.embeddings.{name}"
        for name in ("LayerNorm.bias", "LayerNorm.weight", "position_embeddings.weight", "word_embeddings.weight")
    }
    words = peer.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(chain.embed.block.text.words, words)
    scattered(BlipModel(blip_config())).save_pretrained(tmp_path / "model")
    report = load_pretrained(chain, BLIP, tmp_path / "model")
    left = {"logit_scale", "text_projection.weight", "visual_projection.weight"}
    assert set(report.unexpected) == {*left, "text_model.pooler.dense.bias", "text_model.pooler.dense.weight"}


@pytest.mark.parametrize("size", [16, 24], ids=["its own size", "interpolated"])
@pytest.mark.parametrize("way", ["", "shared_"], ids=["per layer", "shared"])
def test_beit_equals_transformers(tmp_path, way, size):
    torch.manual_seed(5)
    config = BeitConfig(
        **{**SIZES, **PIXELS, f"use_{way}relative_position_bias": True},
        drop_path_rate=0.0,
        use_mean_pooling=False,
        attn_implementation="eager",
    )
    peer = scattered(BeitModel(config, add_pooling_layer=False))
    peer.save_pretrained(tmp_path)
    chain = build_chain(BEIT, (), TOKENS)
    report = load_pretrained(chain, BEIT, tmp_path)
    assert (report.architecture, report.unexpected, report.differences) == ("beit", (), ())
    assert report.resized == {}
    assert not chain.embed.block.visual.positions.any()
    frames = frames_of(size)
    own, wanted = visual_of(chain, frames), peer(normalised(frames)).last_hidden_state
    torch.testing.assert_close(own, wanted, **NEAR)
    torch.testing.assert_close(chain.features(frames), wanted, **NEAR)
    layout = StepLayout("image_text", 2, 1, "encode", visual={"clean": slice(0, 2)}, class_only=True)
    torch.testing.assert_close(chain.fold(State({"frames": frames}, layout))["visual"][:, 0], wanted[:, 0], **NEAR)
    direction = torch.randn_like(own)
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    if way:  # one table there is one in each block here, and its gradient their sum
        parts = [chain.visual_00.block.relative.bias.grad, chain.visual_01.block.relative.bias.grad]
        shared = peer.shared_position_bias.relative_position_bias_table
        torch.testing.assert_close(sum(parts), shared.grad, rtol=2e-4, atol=3e-5)
        shared.grad = None
    check_gradients(chain, peer, "beit", 28)


def test_a_clip_of_equal_frames_is_the_image_with_beits_bias_too(tmp_path):
    torch.manual_seed(6)
    chain = build_chain(BEIT, (), TOKENS).eval()
    for layer in (chain.visual_00, chain.visual_01):
        torch.nn.init.normal_(layer.block.relative.bias)
    frames = frames_of()
    torch.testing.assert_close(chain.encode_visual(frames.expand(2, 3, 3, 16, 16)), chain.encode_visual(frames))


def test_beits_pretraining_weights_fill_positions_and_the_mask_token(tmp_path):
    config = BeitConfig(
        **SIZES,
        **PIXELS,
        vocab_size=20,
        use_mask_token=True,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
        layer_scale_init_value=0.1,
        layer_norm_eps=1e-6,
    )
    peer = scattered(BeitForMaskedImageModeling(config))
    peer.save_pretrained(tmp_path)
    model = replace(CONFIG, layer_scale_init=1.0)
    chain = build_chain(model, (), TOKENS)
    report = load_pretrained(chain, model, tmp_path, part="vision")
    assert torch.equal(chain.embed.block.visual.positions, peer.beit.embeddings.position_embeddings[0])
    assert torch.equal(chain.embed.block.visual.mask_token, peer.beit.embeddings.mask_token.flatten())
    # The model's own head and normalisation, which mean pooling moves behind the encoder.
    assert report.differences == (
        "no normalisation behind the last block there (its mean pooling has one); ours keeps its own",
    )


def refused(tmp_path, config, wanted, **arguments):
    with pytest.raises(ModelError) as caught:
        load_pretrained(build_chain(config, (), TOKENS), config, tmp_path, **arguments)
    assert [line.removeprefix(f"{tmp_path}: ") for line in str(caught.value).splitlines()] == wanted


def test_options_that_weights_need_are_all_named_at_once(tmp_path):
    peer = clip_model()
    peer.save_pretrained(tmp_path)
    change = "with these weights; set it, or give other weights"
    named = [
        f'model.vision.activation: got "gelu"; allowed "quick_gelu" {change}',
        f"model.vision.norm_embeddings: got false; allowed true {change}",
    ]
    refused(tmp_path, CONFIG, named, part="vision")
    heads = replace(CLIP, num_heads=4)
    refused(tmp_path, heads, [f"model.num_heads: got 4; allowed 2 {change}"], part="vision")
    with pytest.raises(ModelError, match="got weights that architecture 'unified' does not know, first names: "):
        load_pretrained(build_chain(Unified.like(CONFIG), (), TOKENS), Unified.like(CONFIG), tmp_path, part="vision")
    BeitModel(BeitConfig(**SIZES, **PIXELS, use_relative_position_bias=True)).save_pretrained(tmp_path)
    named = [
        f"model.vision.relative_positions: got false; allowed true {change}",
        f"model.layer_scale_init: got null; allowed 0.1 {change}",
    ]
    refused(tmp_path, CONFIG, named)
    BertModel(BertConfig(**SIZES, **WORDS, hidden_act="relu")).save_pretrained(tmp_path)
    named = [
        f'model.text_norm: got "pre"; allowed "post" {change}',
        f'model.activation of texts: got "gelu"; allowed "relu" {change}',
    ]
    refused(tmp_path, replace(CONFIG, text_norm="pre"), named)


def test_parts_and_kinds_that_have_no_place_are_refused_by_name(tmp_path):
    clip_model().save_pretrained(tmp_path)
    why = (
        "allowed is its visual tower, since our text encoder reads in both directions and from its first token, CLIP's "
        "in one and from its last, without a mask token; name the folder under weights.vision, and a BERT under "
        "weights.text, or set model.kind to clip, which has both towers of CLIP"
    )
    for part in ("all", "text"):
        refused(tmp_path, CLIP, [f"got CLIP's text tower under weights.{part}; {why}"], part=part)
    ViTModel(ViTConfig(**SIZES, **PIXELS)).save_pretrained(tmp_path)
    named = (
        "got a checkpoint of vit, which has nothing for text; allowed there is BERT or BLIP; name it under another key"
    )
    refused(tmp_path, CONFIG, [named], part="text")
    RobertaModel(RobertaConfig(**SIZES, **WORDS)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ModelError, match=r"config.json: got model_type 'roberta', whose weights are not understood"):
        load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path / "roberta")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: got a file that is no JSON"):
        load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path)


def test_another_epsilon_is_said(tmp_path):
    ViTModel(ViTConfig(**SIZES, **PIXELS)).save_pretrained(tmp_path)
    report = load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path)
    assert report.lines()[1] == "  differs: layer_norm_eps 1e-12 there, 1e-06 here (model.vision.norm_eps)"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    assert load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path).differences == ()
