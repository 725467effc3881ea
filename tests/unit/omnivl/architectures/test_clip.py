"""CLIP against transformers' class, in both directions of weights, and what the architecture promises."""

import json
from dataclasses import replace

import pytest
import torch
from peer_open_clip import import_open_clip
from small_clip import SMALL, TOKENS, make_batch, run, scattered_chain, theirs, with_activation
from transformers import CLIPModel

from moe.config import DenseConfig, LIMoEConfig, MoMEConfig
from omnivl.architectures import CLIP
from omnivl.architectures.base import check
from omnivl.architectures.build import build_chain
from omnivl.architectures.clip import up_to_end
from omnivl.architectures.clip_names import from_transformers
from omnivl.architectures.foreign import CLIP_PIXELS, OUR_PIXELS
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.objectives import ITC, MLM, MRM, VLM, UniVLC
from omnivl.parts import attention
from omnivl.parts.sizes import MomentumConfig
from omnivl.pretrained.load import load_pretrained

PLAIN = (ITC(),)


def inputs(batch, *, masked=False):
    """What transformers' class reads of a batch."""
    made = {"pixel_values": batch.frames[:, 0] / 127.5 - 1, "input_ids": batch.token_ids}
    return {**made, "attention_mask": up_to_end(batch.token_ids, TOKENS).long()} if masked else made


@pytest.mark.parametrize("pad", [TOKENS.pad, TOKENS.sep])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_embeddings_loss_and_gradients_are_those_of_transformers(activation, pad):
    other, batch = theirs(activation), make_batch(pad=pad)
    chain = scattered_chain(with_activation(activation), PLAIN)
    parameters = dict(chain.named_parameters())
    given = from_transformers(other.state_dict(), OUR_PIXELS)
    assert given.keys() == parameters.keys()
    for name, tensor in given.items():
        parameters[name].data.copy_(tensor)
    for masked in (False, True):  # causal texts are read where they end: what follows makes no difference
        wanted = other(**inputs(batch, masked=masked), return_loss=True)
        got = run(chain, PLAIN, batch)["loss"]
        torch.testing.assert_close(chain.encode_visual(batch.frames), wanted.image_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chain.encode_text(batch.token_ids), wanted.text_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got, wanted.loss, rtol=1e-5, atol=1e-5)
    got.backward()
    wanted.loss.backward()
    gradients = from_transformers({name: one.grad for name, one in other.named_parameters()}, OUR_PIXELS)
    assert parameters["contrast.logit_scale"].grad.abs().item() > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("preset", ["b16", "l14"])
def test_published_models_have_their_number_of_parameters(preset):
    with torch.device("meta"):
        chain = build_chain(CLIP.presets[preset], PLAIN, TOKENS)
    counts = {"b16": 149_620_737, "l14": 427_616_513}
    assert sum(parameter.numel() for parameter in chain.parameters()) == counts[preset]
    assert not list(chain.buffers())


def test_presets_fit_together():
    for config in CLIP.presets.values():
        check(config)
    assert CLIP.presets["b16"] == CLIP()


def save(folder, model, **pixels):
    model.save_pretrained(folder)
    if pixels:
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


@pytest.mark.parametrize("own", [False, True])
def test_a_folder_loads_whole_with_its_pixels(tmp_path, own):
    """Pixels of CLIP's own mean and deviation give the same embeddings from ours."""
    other, batch = theirs("quick_gelu").eval(), make_batch()
    other.logit_scale.data.fill_(3.0)
    save(tmp_path, other, **({"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.25, 0.75]} if own else {}))
    chain = scattered_chain(with_activation("quick_gelu"), PLAIN)
    report = load_pretrained(chain, with_activation("quick_gelu"), tmp_path)
    assert (report.missing, report.unexpected, len(report.matched)) == ((), (), len(list(chain.parameters())))
    mean, std = ([0.2, 0.3, 0.4], [0.5, 0.25, 0.75]) if own else (CLIP_PIXELS.mean, CLIP_PIXELS.std)
    pixels = (batch.frames[:, 0] / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    wanted = other(input_ids=batch.token_ids, pixel_values=pixels)
    torch.testing.assert_close(chain.encode_visual(batch.frames), wanted.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chain.encode_text(batch.token_ids), wanted.text_embeds, rtol=1e-4, atol=1e-5)
    assert chain.contrast.logit_scale.item() == 3.0


def test_one_tower_is_filled_and_positions_are_resized(tmp_path):
    save(tmp_path, theirs("gelu"))
    larger = replace(SMALL, image_size=24, vocab_size=60)
    chain = scattered_chain(larger, PLAIN)
    before = {name: one.detach().clone() for name, one in chain.named_parameters()}
    report = load_pretrained(chain, larger, tmp_path, part="vision")
    changed = {name for name, one in chain.named_parameters() if not torch.equal(one, before[name])}
    assert changed == set(report.matched)
    assert not [name for name in changed if "text" in name]
    assert report.resized == {"embed.block.visual.positions": "[5, 16] -> [10, 16]"}
    # Words that are added keep their values.
    load_pretrained(chain, larger, tmp_path)
    assert torch.equal(chain.embed.block.text.words[50:], before["embed.block.text.words"][50:])


def test_other_options_than_the_weights_have_are_refused(tmp_path):
    save(tmp_path, theirs("quick_gelu"))
    chain = scattered_chain(SMALL, PLAIN)
    with pytest.raises(ModelError) as caught:
        load_pretrained(chain, replace(SMALL, vision=replace(SMALL.vision, num_heads=4)), tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: model.{line} with these weights; set it, or give other weights"
        for line in (
            "vision.activation: got 'gelu'; allowed 'quick_gelu'",
            "vision.num_heads: got 4; allowed 2",
            "text.activation: got 'gelu'; allowed 'quick_gelu'",
        )
    ]


def test_what_goes_out_comes_back(tmp_path):
    chain, batch = scattered_chain(with_activation("quick_gelu"), PLAIN), make_batch()
    chain.contrast.logit_scale.data.fill_(7.0)  # beyond its bound: it acts as ln 100, and is written so
    foreign = with_activation("quick_gelu").to_foreign(chain, TOKENS)
    other = CLIPModel(CLIPModel.config_class.from_dict(dict(foreign.config))).eval()
    other.load_state_dict(foreign.weights)
    wanted = other(**inputs(batch))
    torch.testing.assert_close(chain.encode_visual(batch.frames), wanted.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chain.encode_text(batch.token_ids), wanted.text_embeds, rtol=1e-4, atol=1e-5)
    assert other.logit_scale.exp().item() == pytest.approx(100.0)
    save(tmp_path, other, **foreign.image_processor)
    again = scattered_chain(with_activation("quick_gelu"), PLAIN, seed=3)
    load_pretrained(again, with_activation("quick_gelu"), tmp_path)
    for (name, one), two in zip(chain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two) or name == "contrast.logit_scale"


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (SMALL, replace(TOKENS, sep=2), "tokenizer: got the end token id 2, at which"),
        (
            replace(SMALL, vision=replace(SMALL.vision, ffn=MoMEConfig())),
            TOKENS,
            "model.vision: got 'mome' feed-forward layers, layer_scale_init None and norm 'pre'; allowed are 'dense'",
        ),
    ],
)
def test_what_transformers_does_not_compute_is_not_written(config, tokens, message):
    with pytest.raises(ModelError, match=message):
        config.to_foreign(scattered_chain(config, PLAIN), tokens)


def test_a_text_ends_at_its_first_end_token():
    tokens = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=9, num_reserved=5)
    ids = torch.tensor([[1, 5, 2, 0, 0], [1, 5, 6, 7, 2], [1, 5, 2, 2, 2], [1, 5, 0, 0, 0]])
    lengths = (up_to_end(ids, tokens).sum(1), up_to_end(ids, replace(tokens, pad=2)).sum(1))
    assert [one.tolist() for one in lengths] == [[3, 5, 3, 2], [3, 5, 3, 5]]


def test_a_clip_is_the_mean_of_its_frames():
    chain, clip = scattered_chain(SMALL, PLAIN), make_batch("video_text").frames
    frames = torch.stack([chain.encode_visual(clip[:, i : i + 1]) for i in range(3)])
    wanted = torch.nn.functional.normalize(frames.mean(0), dim=-1)
    torch.testing.assert_close(chain.encode_visual(clip), wanted)
    torch.testing.assert_close(chain.features(clip)[:, 5:10], chain.features(clip[:, 1:2]))


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("objective", [ITC(loss_type="sigmoid"), UniVLC(), UniVLC(queue_size=8)])
def test_idle_parameters_are_those_without_a_gradient(kind, objective):
    config = replace(SMALL, momentum=MomentumConfig(decay=0.5))
    chain, batch = scattered_chain(config, (objective,)), make_batch(kind)
    state = run(chain, (objective,), batch)
    state["loss"].backward()
    chain.after_step()
    layout = plan_layout((objective,), kind, batch.size, batch.num_frames)
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([layout])}
    for name, parameter in chain.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad is None) == (id(parameter) in idle), name
            assert parameter.grad is not None, name  # nothing is idle in either kind


def test_twins_embed_as_the_encoders_until_they_part():
    config, objectives = replace(SMALL, momentum=MomentumConfig()), (UniVLC(queue_size=8),)
    chain, batch = scattered_chain(config, objectives), make_batch()
    chain.copy_to_twins()
    layout = plan_layout(objectives, "image_text", 4, 1)
    state = State.from_batch(batch, layout)
    for layer in chain.layers:
        if layer.stack == "join":
            break
        state = layer(state)
    for name in ("visual_embedding", "text_embedding"):
        torch.testing.assert_close(state[f"momentum_{name}"], state[name])


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_operations_are_what_torch_counts(monkeypatch, kind):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    config = replace(CLIP.presets["tiny"], vocab_size=50, text_length=8, image_size=16, num_frames=3, projection_size=1)
    chain, batch = build_chain(config, PLAIN, TOKENS), make_batch(kind, size=2)
    with FlopCounterMode(display=False) as counter:
        run(chain, PLAIN, batch)["loss"].backward()
    layout, tokens = plan_layout(PLAIN, kind, 2, batch.num_frames), int(up_to_end(batch.token_ids, TOKENS).sum())
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout, tokens), rel=2e-3)


@pytest.mark.parametrize("objective", [VLM(), MRM(), MLM()])
def test_objectives_on_what_there_is_not_are_refused(objective):
    with pytest.raises(ModelError, match="architecture 'clip' has visual, text, embedding; take the objective out"):
        build_chain(SMALL, (ITC(), objective), TOKENS)


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        (
            {"vision": replace(SMALL.vision, num_heads=3, norm="post"), "image_size": 20},
            [
                "image_size: got 20; allowed a multiple of patch_size 8; change either",
                "vision.hidden_size: got 16; allowed a multiple of num_heads 3; change either",
                "vision.norm: got 'post'; allowed 'pre' in 'clip'; set it to 'pre'",
            ],
        ),
        (
            {"text": replace(SMALL.text, layers=0, drop_path=0.1, layer_scale_init=0.1)},
            [
                "text.layers: got 0; allowed 1 or more; raise it, e.g. to 12",
                "text.drop_path: got 0.1; allowed 0; the text tower has none",
                "text.layer_scale_init: got 0.1; allowed null; the text tower has none",
            ],
        ),
        (
            {
                "vision": replace(SMALL.vision, ffn=LIMoEConfig(num_experts=2), activation="quick_gelu"),
                "text": replace(SMALL.text, ffn=LIMoEConfig(num_experts=4)),
            },
            [
                "vision.activation: got 'quick_gelu' with ffn kind 'limoe'; allowed 'gelu' where there are sparse or "
                "attribute experts; set it to 'gelu'",
            ],
        ),
        (
            {"vision": replace(SMALL.vision, ffn=LIMoEConfig(num_experts=2, blocks=(5,)))},
            [
                "vision.ffn.blocks: got 5; allowed -2 to 1, the blocks of 2 layers; name another block or build more",
            ],
        ),
    ],
)
def test_what_does_not_fit_together_is_named(changed, lines):
    assert [str(one).removeprefix("model.") for one in replace(SMALL, **changed).misfits()] == lines


def test_experts_in_one_tower_train():
    config = replace(SMALL, vision=replace(SMALL.vision, ffn=LIMoEConfig(num_experts=2, every=1)))
    assert isinstance(config.text.ffn, DenseConfig)
    out = run(scattered_chain(config, PLAIN), PLAIN, make_batch())
    assert {name.split("/")[0] for name in out.named("loss")} == {"itc", "router"}
    assert torch.isfinite(out["loss"])


def as_transformers(tensors):
    """Tensors of open_clip's class by the names of transformers', with the shapes that they have there."""
    pieces = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
    pieces |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    alone = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.proj": "visual_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
    found = {}
    for name, tensor in tensors.items():
        stem, _, ending = name.rpartition(".")
        if "resblocks." in name:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            block, _, inner = name.partition("resblocks.")[2].partition(".")
            start = f"{tower}.encoder.layers.{block}."
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                for part, third in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{start}self_attn.{part}_proj.{kind}"] = third
            else:
                found[f"{start}{pieces[inner.rpartition('.')[0]]}.{ending}"] = tensor
        elif name in alone:
            found[alone[name]] = tensor.t() if name in ("visual.proj", "text_projection") else tensor
        else:
            found[f"{alone[stem]}.{ending}"] = tensor
    return found


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_has_the_same_embeddings_losses_and_gradients(activation, loss):
    open_clip = import_open_clip()
    torch.manual_seed(1)
    peer = open_clip.CLIP(
        embed_dim=10,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=8, vocab_size=50, width=12, heads=3, layers=3, mlp_ratio=3.0, no_causal_mask=False
        ),
        quick_gelu=activation == "quick_gelu",
    )
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.2 * torch.randn_like(parameter))
    objectives = (ITC(loss_type=loss, temperature=0.07),)
    chain, batch = scattered_chain(with_activation(activation), objectives), make_batch()
    parameters = dict(chain.named_parameters())
    own = from_transformers(as_transformers(dict(peer.named_parameters())), OUR_PIXELS)
    for name, tensor in own.items():
        parameters[name].data.copy_(tensor)
    pixels = batch.frames[:, 0] / 127.5 - 1
    image, text, scale = peer(pixels, batch.token_ids)
    torch.testing.assert_close(chain.encode_visual(batch.frames), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chain.encode_text(batch.token_ids), text, rtol=1e-4, atol=1e-5)
    softmax, sigmoid = open_clip.loss.ClipLoss(), open_clip.loss.SigLipLoss()
    wanted = softmax(image, text, scale) if loss == "softmax" else sigmoid(image, text, scale, torch.tensor(-10.0))
    got = run(chain, objectives, batch)["loss"]
    torch.testing.assert_close(got, wanted)
    got.backward()
    wanted.backward()
    gradients = from_transformers(
        as_transformers({name: one.grad for name, one in peer.named_parameters()}), OUR_PIXELS
    )
    assert gradients.keys() | {"losses.heads.itc.bias"} == parameters.keys() | {"losses.heads.itc.bias"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=2e-5, msg=name)
