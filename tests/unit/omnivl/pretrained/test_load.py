"""Parity with transformers' classes, forward and gradient, through files on disk."""

from dataclasses import replace

import pytest
import torch
from small_towers import CONFIG, SIZES, TOKENS, encoders, scattered
from transformers import BertConfig, BertModel, TimesformerConfig, TimesformerModel, ViTConfig, ViTModel

from omnivl.architectures.build import build_chain
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.objectives import UniVLC
from omnivl.pretrained.load import load_pretrained
from omnivl.pretrained.names import translate

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def check_gradients(chain, peer, architecture):
    # Token types are added into the positions when loaded; their gradient is not part of the positions'.
    gradients = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None and "token_type" not in n}
    translated = translate(gradients, architecture, ("text",)).tensors
    own = dict(chain.named_parameters())
    assert len(translated) > 20
    for name, wanted in translated.items():
        torch.testing.assert_close(own[name].grad, wanted[: len(own[name])], rtol=1e-4, atol=1e-5, msg=name)


def test_vit_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, **STILL, image_size=16, patch_size=8, layer_norm_eps=1e-6)
    peer = scattered(ViTModel(config, add_pooling_layer=False))
    peer.save_pretrained(tmp_path)
    chain = build_chain(CONFIG, (UniVLC(queue_size=4),), TOKENS)
    report = load_pretrained(chain, CONFIG, tmp_path)
    assert report.architecture == "vit"
    assert not report.unexpected
    assert not report.resized
    allowed = ("temporal.", "mask_token", "video_delta", "times")
    assert report.missing
    assert all(any(part in name for part in allowed) for name in report.missing)
    frames = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    layout = StepLayout("image_text", 2, 1, visual={"clean": slice(0, 2)})
    own = encoders(chain, State({"frames": frames}, layout))["visual"]
    wanted = peer(frames[:, 0].float() / 127.5 - 1.0).last_hidden_state
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(own)
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    check_gradients(chain, peer, "vit")
    twin, online = chain.embed.momentum_block, chain.embed.block
    assert torch.equal(twin.visual.positions, online.visual.positions)


@pytest.mark.parametrize("num_frames", [3, 2, 5])
def test_timesformer_equals_transformers(tmp_path, num_frames):
    """Also with another number of frames than it was trained with, where both interpolate its positions in time."""
    torch.manual_seed(1)
    config = TimesformerConfig(**SIZES, **STILL, image_size=16, patch_size=8, num_frames=3, layer_norm_eps=1e-6)
    peer = scattered(TimesformerModel(config))
    peer.save_pretrained(tmp_path)
    peer.config.num_frames = num_frames  # read by its layers; its table keeps three
    model = replace(CONFIG, num_frames=num_frames)
    chain = build_chain(model, (), TOKENS)
    report = load_pretrained(chain, model, tmp_path)
    assert report.architecture == "timesformer"
    assert not report.unexpected
    changed = {"embed.block.visual.times": f"[3, 16] -> [{num_frames}, 16]"} if num_frames != 3 else {}
    assert report.resized == changed
    assert {name.rsplit(".", 1)[1] for name in report.missing} == {"mask_token", "video_delta"}
    frames = torch.randint(0, 256, (2, num_frames, 3, 16, 16), dtype=torch.uint8)
    layout = StepLayout("video_text", 2, num_frames, visual={"clean": slice(0, 2)})
    own = encoders(chain, State({"frames": frames}, layout))["visual"]
    theirs = peer(frames.float() / 127.5 - 1.0).last_hidden_state
    # Theirs runs patch by patch, each through time; ours frame by frame.
    patches = theirs[:, 1:].unflatten(1, (4, num_frames)).transpose(1, 2).flatten(1, 2)
    wanted = torch.cat([theirs[:, :1], patches], dim=1)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(own)
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    if num_frames == 3:  # else the tables have other sizes
        check_gradients(chain, peer, "timesformer")


def test_bert_equals_transformers(tmp_path):
    torch.manual_seed(2)
    config = BertConfig(**SIZES, **STILL, vocab_size=50, max_position_embeddings=9)
    peer = scattered(BertModel(config))
    peer.save_pretrained(tmp_path)
    chain = build_chain(CONFIG, (), TOKENS)
    report = load_pretrained(chain, CONFIG, tmp_path, ("text", "alignment"))
    assert report.architecture == "bert"
    assert report.unexpected == ("pooler.dense.bias", "pooler.dense.weight")
    assert report.resized == {"embed.block.text.positions": "[9, 16] -> [6, 16]"}
    assert all(".cross." in name or ".norm2." in name for name in report.missing)
    assert torch.equal(chain.alignment_00.block.ffn.fc1.weight, chain.text_00.block.ffn.fc1.weight)
    token_ids = torch.tensor([[1, 7, 8, 9, 2, 0], [1, 11, 2, 0, 0, 0]])
    layout = StepLayout("image_text", 2, 1, text={"clean": slice(0, 2)})
    mask = token_ids != 0
    own = encoders(chain, State({"token_ids": token_ids}, layout))["text"][mask]
    wanted = peer(token_ids, attention_mask=mask.long()).last_hidden_state[mask]
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(own)
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    check_gradients(chain, peer, "bert")


def test_positions_of_shorter_texts_leave_the_rest_as_it_is(tmp_path):
    peer = scattered(BertModel(BertConfig(**SIZES, **STILL, vocab_size=50, max_position_embeddings=4)))
    peer.save_pretrained(tmp_path)
    chain = build_chain(CONFIG, (), TOKENS)
    table = chain.embed.block.text.positions
    before = table.detach().clone()
    report = load_pretrained(chain, CONFIG, tmp_path)
    assert report.resized == {"embed.block.text.positions": "[4, 16] -> [6, 16]"}
    assert torch.equal(table[4:], before[4:])
    assert not torch.equal(table[:4], before[:4])


def test_positions_are_interpolated_to_another_size(tmp_path):
    config = ViTConfig(**SIZES, image_size=32, patch_size=8)
    scattered(ViTModel(config)).save_pretrained(tmp_path)
    report = load_pretrained(build_chain(CONFIG, (), TOKENS), CONFIG, tmp_path / "model.safetensors")
    assert report.resized == {"embed.block.visual.positions": "[17, 16] -> [5, 16]"}
    assert "pooler.dense.weight" in report.unexpected
    assert "  unexpected pooler.dense.weight" in report.lines()


def test_torch_files_are_read_too(tmp_path):
    peer = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))
    torch.save({f"vit.{name}": p for name, p in peer.state_dict().items()}, tmp_path / "pytorch_model.bin")
    chain = build_chain(CONFIG, (), TOKENS)
    load_pretrained(chain, CONFIG, tmp_path)
    assert torch.equal(chain.visual_norm.block.weight, peer.layernorm.weight)
    assert torch.equal(chain.embed.block.visual.class_token, peer.embeddings.cls_token.flatten())


def test_errors_say_what_to_do(tmp_path):
    chain = build_chain(CONFIG, (), TOKENS)
    with pytest.raises(ModelError, match="holds neither model"):
        load_pretrained(chain, CONFIG, tmp_path)
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="neither ViT, TimeSformer, BEiT, BERT, CLIP nor BLIP, first names: conv1"):
        load_pretrained(chain, CONFIG, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="not readable as weights"):
        load_pretrained(chain, CONFIG, tmp_path)
    wide = ViTModel(ViTConfig(**{**SIZES, "hidden_size": 32}, image_size=16, patch_size=8))
    wide.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="choose a preset of the checkpoint's sizes"):
        load_pretrained(chain, CONFIG, tmp_path)
