"""ALIGN: parity with transformers' class through files on disk, export, running statistics, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_towers import TOKENS, scattered
from torch import nn
from transformers import AlignConfig, AlignModel, AutoModel

from moe.config import LIMoEConfig
from omnivl.architectures import ALIGN
from omnivl.architectures.align_names import odd_sides
from omnivl.architectures.build import build_chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import ModelError
from omnivl.objectives import ITC, MLM, VLM
from omnivl.parts import attention
from omnivl.parts.efficientnet import BatchNorm, EfficientNet
from omnivl.parts.sizes import MomentumConfig, Transformer
from omnivl.pretrained.load import load_pretrained

NEAR = {"rtol": 2e-5, "atol": 2e-5}
BERT = Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12)
IMAGE = EfficientNet(width=0.25, depth=0.5, drop_path=0.0)
SMALL = ALIGN(vision=IMAGE, text=BERT, image_size=76, text_length=7, vocab_size=50)
OBJECTIVE = ITC(temperature=1.0, temperature_bounds=(0.01, 10.0), label_smoothing=0.1)
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])


def peer_of(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    image = {"image_size": 76, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": IMAGE.outputs}
    image |= {"drop_connect_rate": 0.0, "depthwise_padding": odd_sides(IMAGE.blocks(76)), **options}
    config = AlignConfig(
        text_config={**sizes, **still, "vocab_size": 50, "max_position_embeddings": 7},
        vision_config=image,
        projection_dim=IMAGE.outputs,
    )
    peer = scattered(AlignModel(config))
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    peer.temperature.data.fill_(0.7)
    return peer


def loaded(peer, folder, model=SMALL):
    peer.save_pretrained(folder)
    chain = build_chain(model, (OBJECTIVE,), TOKENS)
    return chain, load_pretrained(chain, model, folder)


def inputs_of(side=76):
    torch.manual_seed(3)
    frames = torch.randint(0, 256, (4, 1, 3, side, side), dtype=torch.uint8)
    return frames, torch.where(MASK == 1, torch.randint(5, 50, (4, 7)), TOKENS.pad)


def theirs_of(frames, token_ids):
    return {"pixel_values": frames[:, 0].float() / 127.5 - 1.0, "input_ids": token_ids, "attention_mask": MASK}


def state_of(frames, token_ids, objectives=(OBJECTIVE,)):
    batch = Batch("image_text", frames, token_ids, *torch.arange(12).view(3, 4))
    return State.from_batch(batch, plan_layout(objectives, "image_text", 4, 1))


def test_sides_of_the_small_model_are_even_and_odd():
    """Both paddings of a stride are compared."""
    strided = [block.side for block in IMAGE.blocks(76) if block.stride == 2]
    assert strided == [38, 19, 10, 5]
    assert odd_sides(IMAGE.blocks(76)) == [2, 7]


@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients_equal_transformers(tmp_path, training):
    """In training by the batch's statistics, else by the running ones that the file holds."""
    torch.manual_seed(0)
    peer = peer_of().train(training)
    chain, report = loaded(peer, tmp_path)
    chain.train(training)
    assert report.missing == ()
    assert all(name.startswith("text_model.pooler.") for name in report.unexpected)
    frames, token_ids = inputs_of()
    own = chain(state_of(frames, token_ids))["loss"]
    wanted = peer(**theirs_of(frames, token_ids), return_loss=True).loss
    torch.testing.assert_close(own, wanted, **NEAR)
    own.backward()
    wanted.backward()
    given = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in peer.named_parameters()}
    scale, given["temperature"] = given["temperature"], torch.ones(())
    gradients = SMALL.from_foreign(given, tmp_path / "none")
    # Of s = -log t: dL/ds = - t dL/dt.
    gradients["contrast.logit_scale"] = -0.7 * scale.reshape(1)
    types = peer.text_model.embeddings.token_type_embeddings.weight.grad
    gradients["embed.block.text.positions"] = gradients["embed.block.text.positions"] - types[0]
    for name, parameter in chain.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=3e-5, msg=name)


def test_embeddings_equal_transformers(tmp_path):
    torch.manual_seed(0)
    peer = peer_of().eval()
    chain, _ = loaded(peer, tmp_path)
    chain.eval()
    frames, token_ids = inputs_of()
    with torch.no_grad():
        wanted = peer(**theirs_of(frames, token_ids))
        torch.testing.assert_close(chain.encode_visual(frames), F.normalize(wanted.image_embeds, dim=-1), **NEAR)
        torch.testing.assert_close(chain.encode_text(token_ids), F.normalize(wanted.text_embeds, dim=-1), **NEAR)


def test_an_exported_model_is_transformers_class(tmp_path):
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (OBJECTIVE,), TOKENS))
    frames, token_ids = inputs_of()
    chain(state_of(frames, token_ids))["loss"].backward()
    chain.after_step()
    foreign = SMALL.to_foreign(chain.eval(), TOKENS)
    (tmp_path / "config.json").write_text(json.dumps(foreign.config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(foreign.image_processor))
    save_file({name: one.contiguous() for name, one in foreign.weights.items()}, tmp_path / "model.safetensors")
    peer, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(peer, AlignModel)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert foreign.left_out == ()
    with torch.no_grad():
        wanted = peer.eval()(**theirs_of(frames, token_ids))
        torch.testing.assert_close(chain.encode_visual(frames), F.normalize(wanted.image_embeds, dim=-1), **NEAR)
        torch.testing.assert_close(chain.encode_text(token_ids), F.normalize(wanted.text_embeds, dim=-1), **NEAR)
    torch.testing.assert_close(peer.temperature, chain.contrast.scale().reciprocal())
    again = build_chain(SMALL, (OBJECTIVE,), TOKENS)
    assert load_pretrained(again, SMALL, tmp_path).missing == ()
    for name, tensor in chain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_the_published_configuration_has_transformers_size():
    with torch.device("meta"):
        chain, peer = build_chain(ALIGN(), (), TOKENS), AlignModel(AlignConfig())
    own, theirs = (sum(parameter.numel() for parameter in model.parameters()) for model in (chain, peer))
    # There: the pooler of texts, 512 positions, two token types of which one is folded into them.
    assert own + 768 * 768 + 768 + (512 - 64) * 768 + 2 * 768 == theirs
    assert ALIGN().vision.layers == 55


def test_statistics_run_once_a_step_and_not_in_evaluation():
    """By hand: two micro-batches with means 2 and 4 and unbiased variances 2 and 8, decay 0.9."""
    torch.manual_seed(0)
    norm = BatchNorm(1, EfficientNet(norm_decay=0.9, norm_eps=1e-9))
    batches = torch.tensor([1.0, 3.0]).view(2, 1, 1), torch.tensor([2.0, 6.0]).view(2, 1, 1)
    found = []
    for batch in batches:
        made, statistics = norm(batch, LocalGather())
        torch.testing.assert_close(made.flatten(), torch.tensor([-1.0, 1.0]))
        found.append(statistics)
    assert norm.mean.item() == 0.0, "a forward pass changes nothing"
    torch.testing.assert_close(found[0].flatten(), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(found[1].flatten(), torch.tensor([4.0, 8.0]))
    norm.follow((found[0] + found[1]) / 2)
    # 0.9 * 0 + 0.1 * 3 and 0.9 * 1 + 0.1 * 5.
    torch.testing.assert_close(torch.cat([norm.mean, norm.variance]), torch.tensor([0.3, 1.4]))
    made, _ = norm.eval()(torch.tensor([0.3]).view(1, 1, 1), LocalGather())
    assert abs(made.item()) < 1e-6


def test_a_skipped_step_and_an_evaluation_leave_statistics_as_they_are():
    torch.manual_seed(0)
    chain = build_chain(SMALL, (OBJECTIVE,), TOKENS)
    before = {name: one.clone() for name, one in chain.named_buffers()}
    frames, token_ids = inputs_of()
    state = state_of(frames, token_ids)
    chain(state)
    chain.discard_step()
    chain.after_step()
    with torch.no_grad():
        chain(state)
    chain.after_step()
    chain.eval()(state)
    chain.after_step()
    assert all(torch.equal(one, before[name]) for name, one in chain.named_buffers())
    chain.train()(state)
    chain.after_step()
    assert not any(torch.equal(one, before[name]) for name, one in chain.named_buffers())


def test_idle_parameters_are_those_without_a_gradient():
    torch.manual_seed(0)
    chain = build_chain(SMALL, (OBJECTIVE,), TOKENS)
    frames, token_ids = inputs_of()
    state = state_of(frames, token_ids)
    chain(state)["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([state.layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_losses_fall():
    torch.manual_seed(0)
    chain = build_chain(SMALL, (replace(OBJECTIVE, temperature=0.2),), TOKENS)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    state, losses = state_of(*inputs_of()), []
    for _ in range(30):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        chain.after_step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


def test_operations_are_what_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = build_chain(replace(SMALL, text=replace(BERT, hidden_size=64)), (OBJECTIVE,), TOKENS)
    frames, token_ids = inputs_of()
    state = state_of(frames, token_ids.masked_fill(token_ids == TOKENS.pad, 9))
    # Of gradients torch counts products of all channels with all others, also where groups convolve each by itself.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chain(state)
    stem = chain.embed.flops(state.layout, None)
    forward = (chain_flops(chain, state.layout) - stem) / 3 + stem / 2
    outside = 2 * 4 * (64 * SMALL.vision.outputs + 2 * 4 * SMALL.vision.outputs)  # projection and similarities
    assert counter.get_total_flops() == pytest.approx(forward + outside, rel=5e-3)


@pytest.mark.parametrize(
    ("objective", "stream"), [(VLM(), "fused"), (MLM(), "fused")], ids=lambda value: getattr(value, "key", value)
)
def test_objectives_on_streams_that_it_lacks_are_refused(objective, stream):
    with pytest.raises(ModelError, match=f"asks for the stream '{stream}'"):
        build_chain(SMALL, (objective,), TOKENS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"sizes": "native"},
            "model.sizes: got 'native'; allowed 'fixed' or 'stretched' with architecture 'align'; set it to 'fixed'",
        ),
        (
            {"text": replace(BERT, num_heads=3)},
            "model.text.hidden_size: got 16; allowed a multiple of num_heads 3; change either",
        ),
        (
            {"text": replace(BERT, drop_path=0.1)},
            "model.text.drop_path: got 0.1; allowed 0; blocks that read texts have none",
        ),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'align', which has none; set it to null",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(model, message):
    with pytest.raises(ModelError) as caught:
        build_chain(replace(SMALL, **model), (), TOKENS)
    assert str(caught.value) == message


def test_what_transformers_class_does_not_compute_is_refused(tmp_path):
    with pytest.raises(ModelError) as caught:
        loaded(peer_of(batch_norm_eps=1e-5), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: model.vision.norm_eps: got 0.001; allowed 1e-05 with these weights; set it, or give other weights"
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    loose = replace(SMALL, vision=replace(IMAGE, norm_eps=1e-5))
    with pytest.raises(ModelError, match=r"got pixels normalised by mean \(0.1, 0.1, 0.1\)"):
        load_pretrained(build_chain(loose, (), TOKENS), loose, tmp_path)
    odd = replace(SMALL, image_size=77)
    with pytest.raises(ModelError, match=r"model\.image_size: got 77"):
        odd.to_foreign(build_chain(odd, (), TOKENS), TOKENS)
    sparse = replace(SMALL, text=replace(BERT, ffn=LIMoEConfig(num_experts=4, every=1, implementation="loop")))
    with pytest.raises(ModelError, match=r"model\.text: got 'limoe' feed-forward layers"):
        sparse.to_foreign(build_chain(sparse, (), TOKENS), TOKENS)
