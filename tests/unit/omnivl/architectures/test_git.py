"""GIT: parity with transformers' class through files on disk, in both directions, writing, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_clip
import torch
from safetensors.torch import save_file
from small_clip import TOKENS
from small_git import OBJECTIVES, SMALL, git_batch, inputs, peer, run, scattered
from transformers import GitConfig, GitForCausalLM

from moe.config import LIMoEConfig
from omnivl.architectures import GIT
from omnivl.architectures.base import check
from omnivl.architectures.build import build_chain
from omnivl.architectures.git_names import from_transformers
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.errors import ModelError
from omnivl.inference.generate import caption_search, generate
from omnivl.objectives import ITC, LM, VLM, PrepareContext
from omnivl.parts import attention
from omnivl.parts.sizes import MomentumConfig
from omnivl.pretrained.load import load_pretrained

PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def saved(model, folder, **pixels):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    return folder


def with_activation(activation):
    return replace(
        SMALL,
        **{name: replace(getattr(SMALL, name), activation=activation) for name in ("vision", "decoder")},
    )


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_loss_and_gradients_are_those_of_transformers(kind, activation, tmp_path):
    config, moving = with_activation(activation), kind == "video_text"
    config = config if moving else replace(config, num_frames=1)
    model, batch, chain = peer(config, moving=moving), git_batch(kind), scattered(config)
    report = load_pretrained(chain, config, saved(model, tmp_path, **PIXELS))
    assert (report.missing, report.unexpected, report.resized) == ((), (), {})
    parameters = dict(chain.named_parameters())
    assert set(report.matched) == parameters.keys()
    wanted, got = model(**inputs(batch)).loss, run(chain, batch)["loss"]
    torch.testing.assert_close(got, wanted)
    got.backward()
    wanted.backward()
    theirs = {name: one.grad for name, one in model.named_parameters()}
    gradients = from_transformers(theirs, tmp_path, config.vision, config.decoder)
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_label_smoothing_is_that_of_the_released_code():
    """Its share goes to the other words alone: of 0.1 to 49 of 50, which is 0.1 * 50 / 49 over all."""
    smooth = (LM(label_smoothing=0.1 * 50 / 49),)
    chain, batch = scattered(objectives=smooth), git_batch()
    model = peer(moving=False)
    parameters = dict(chain.named_parameters())
    for name, tensor in from_transformers(model.state_dict(), Path(), SMALL.vision, SMALL.decoder).items():
        if name not in ("embed.block.visual.patches.weight", "embed.block.visual.positions"):  # pixels are folded in
            parameters[name].data.copy_(tensor)
    patches = model.git.image_encoder.vision_model.embeddings
    parameters["embed.block.visual.patches.weight"].data.copy_(patches.patch_embedding.weight.flatten(1))
    parameters["embed.block.visual.positions"].data.copy_(patches.position_embedding.weight)
    got = run(chain, batch, smooth)["loss"]
    given = inputs(batch)
    logits = model(**{name: one for name, one in given.items() if name != "labels"}).logits[:, 5:-1]
    total, count = 0.0, 0
    for row, words in zip(logits.log_softmax(-1), given["labels"][:, 1:], strict=True):
        for scores, word in zip(row, words, strict=True):
            if word != -100:
                others = (scores.sum() - scores[word]) / 49
                total, count = total - 0.9 * scores[word] - 0.1 * others, count + 1
    torch.testing.assert_close(got, total / count)


def context():
    return PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)


@pytest.mark.parametrize("frames", [1, 3])
def test_an_exported_model_is_transformers_class(frames, tmp_path):
    config = replace(SMALL, num_frames=frames)
    chain, batch = scattered(config).eval(), git_batch("image_text" if frames == 1 else "video_text")
    made = config.to_foreign(chain, TOKENS)
    assert (made.model, made.left_out) == ("GitForCausalLM", ())
    save_file({name: tensor.contiguous() for name, tensor in made.weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(made.config), encoding="utf-8")
    model, report = GitForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs(batch)).loss, run(chain, batch)["loss"])
    again = scattered(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(made.image_processor), encoding="utf-8")
    load_pretrained(again, config, tmp_path)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, chain.get_parameter(name), msg=name)


def test_what_the_class_lacks_is_not_exported():
    chain = scattered()
    pre = replace(SMALL, decoder=replace(SMALL.decoder, norm="pre"))
    with pytest.raises(ModelError, match=r"model\.decoder: got 'dense' feed-forward layers, .* and norm 'pre'"):
        pre.to_foreign(scattered(pre), TOKENS)
    del chain.losses.vocabulary
    with pytest.raises(ModelError, match="the stage has no head on words"):
        SMALL.to_foreign(chain, TOKENS)


def test_captions_are_those_of_transformers_and_of_writing_without_a_cache(tmp_path):
    config = replace(SMALL, num_frames=1)
    chain, batch = scattered(config).eval(), git_batch()
    model = peer(config).eval()
    load_pretrained(chain, config, saved(model, tmp_path, **PIXELS))
    options = caption_search(TOKENS, 7)
    made = [generate(chain, "lm", batch.frames, options, cached=cached) for cached in (True, False)]
    torch.testing.assert_close(made[0].token_ids, made[1].token_ids)
    torch.testing.assert_close(made[0].log_probability, made[1].log_probability)
    for row in range(4):  # one by one, and only words are written
        words = torch.tensor([[TOKENS.cls]])
        pixels = batch.frames[row : row + 1, 0] / 127.5 - 1
        for step in range(7):
            with torch.no_grad():
                scores = model(pixel_values=pixels, input_ids=words).logits[0, -1]
            scores[: TOKENS.num_reserved] = float("-inf")
            words = torch.cat([words, scores.argmax()[None, None]], dim=1)
            assert words[0, -1] == made[0].token_ids[row, step]
            if words[0, -1] == TOKENS.sep:
                break


def test_beams_share_the_picture():
    chain, batch = scattered().eval(), git_batch()
    options = caption_search(TOKENS, 7, 3)
    made = [generate(chain, "lm", batch.frames, options, cached=cached) for cached in (True, False)]
    torch.testing.assert_close(made[0].token_ids, made[1].token_ids)
    torch.testing.assert_close(made[0].log_probability, made[1].log_probability)


def test_clip_s_image_tower_starts_it(tmp_path):
    other = small_clip.theirs("gelu")
    other.save_pretrained(tmp_path)
    chain = scattered()
    report = load_pretrained(chain, SMALL, tmp_path, part="vision")
    torch.testing.assert_close(
        chain.get_parameter("visual_01.block.ffn.fc2.weight"), other.vision_model.encoder.layers[1].mlp.fc2.weight
    )
    assert set(report.missing) == {f"visual_map.block.{one}" for one in MAP}


MAP = ("times", "linear.weight", "linear.bias", "norm.weight", "norm.bias")


def test_weights_that_ask_for_other_options_are_refused(tmp_path):
    saved(peer(with_activation("quick_gelu")), tmp_path)
    decoder = replace(SMALL.decoder, norm="pre", num_heads=2)
    other = replace(SMALL, decoder=decoder)
    with pytest.raises(ModelError) as caught:
        load_pretrained(scattered(other), other, tmp_path)
    wanted = [
        "model.vision.activation: got 'gelu'; allowed 'quick_gelu' with these weights",
        "model.decoder.num_heads: got 2; allowed 3 with these weights",
        "model.decoder.activation: got 'gelu'; allowed 'quick_gelu' with these weights",
        "model.decoder.norm: got 'pre'; allowed 'post' with these weights",
    ]
    assert str(caught.value).split("\n") == [f"{tmp_path}: {one}; set it, or give other weights" for one in wanted]


def test_a_picture_passes_the_decoder_once_for_several_texts():
    """Two texts of each picture by two objectives: the loss of either is that of it alone."""
    chain = scattered(objectives=(LM(), LM(name="again", label_smoothing=0.0)))
    both = chain.objectives.values()
    batch = git_batch(objectives=tuple(both))
    made = run(chain, batch, tuple(both))
    for one in both:
        torch.testing.assert_close(run(chain, batch, (one,))[f"loss/{one.key}"], made[f"loss/{one.key}"])


def test_no_picture_sees_a_word():
    """The keys that words see in the last block do not depend on the words."""
    chain, batch = scattered().eval(), git_batch()
    block = chain.generation_00.block
    words = torch.randn(4, 8, 12)
    mask = torch.ones(4, 8, dtype=torch.bool)
    memory = torch.randn(4, 5, 12)
    with torch.no_grad():
        seen = [block(text, mask, memory, None, None, None, True)[1] for text in (words, 2 * words)]
        torch.testing.assert_close(seen[0], seen[1])
        changed = words.clone()
        changed[:, 5] = 0.0
        first, second = (block(text, mask, memory, None, None, None, True)[0] for text in (words, changed))
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert (first[:, 5:] - second[:, 5:]).abs().amax((0, 2)).min() > 1e-4
    assert batch.size == 4


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_operations_are_what_torch_counts(monkeypatch, kind, norm):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    config = replace(SMALL, decoder=replace(SMALL.decoder, norm=norm))
    chain, batch = scattered(config), git_batch(kind)
    full = replace(batch, token_ids=torch.tensor([[1, *range(5, 11), 49]] * 4), prepared={})
    batch = replace(full, prepared=OBJECTIVES[0].prepare(full, context()))
    with FlopCounterMode(display=False) as counter:
        run(chain, batch)["loss"].backward()
    counted = chain_flops(chain, plan_layout(OBJECTIVES, kind, 4, batch.num_frames), 4 * 8)
    assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)


def test_what_no_loss_reads_is_idle():
    chain, batch = scattered(), git_batch()
    run(chain, batch)["loss"].backward()
    layout = plan_layout(OBJECTIVES, "image_text", 4, 1)
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([layout])}
    for name, one in chain.named_parameters():
        assert (one.grad is None) == (id(one) in idle), name
    assert {name for name, one in chain.named_parameters() if id(one) in idle} == {"visual_map.block.times"}


def test_sizes_are_those_of_the_released_model():
    """The survey's counts: 42.5 M in the decoder's blocks, 24.2 M in words and 1,024 positions, 23.5 M in the head."""
    with torch.device("meta"):
        chain = build_chain(replace(GIT(), text_length=1024), OBJECTIVES, TOKENS)
        other = GitForCausalLM(GitConfig())
    sizes = {name: sum(one.numel() for one in layer.parameters()) for name, layer in chain.named_layers.items()}
    assert sum(size for name, size in sizes.items() if name.startswith("generation")) == 6 * 7_087_872 == 42_527_232
    words = chain.embed.block.text
    assert words.words.numel() + words.positions.numel() == (30522 + 1024) * 768 == 24_227_328
    assert sizes["losses"] == 30522 * 769 == 23_471_418
    assert sum(sizes.values()) == sum(one.numel() for one in other.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision": replace(SMALL.vision, norm="post")},
            "model.vision.norm: got 'post'; allowed 'pre' in 'git'; set it to 'pre'",
        ),
        (
            {"decoder": replace(SMALL.decoder, ffn=LIMoEConfig())},
            "model.decoder.ffn.kind: got 'limoe'; allowed 'dense' in 'git'; set it to 'dense'; vision may have experts",
        ),
        (
            {"decoder": replace(SMALL.decoder, layer_scale_init=0.1)},
            "model.decoder.layer_scale_init: got 0.1; allowed null; blocks that read texts have none",
        ),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'git', which has none; set it to null",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError) as caught:
        check(replace(SMALL, **change))
    assert str(caught.value) == message


@pytest.mark.parametrize(("objective", "stream"), [(VLM(), "embedding"), (ITC(), "embedding")])
def test_objectives_on_streams_that_it_lacks_are_refused(objective, stream):
    with pytest.raises(ModelError) as caught:
        build_chain(SMALL, (objective,), TOKENS)
    assert f"asks for the stream {stream!r}; architecture 'git' has visual, generation" in str(caught.value)
