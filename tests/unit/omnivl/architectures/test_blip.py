"""BLIP: parity with transformers' classes through files on disk, in both directions, writing, what it refuses."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from small_towers import TOKENS, scattered
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    ViTConfig,
    ViTModel,
)

from moe.config import LIMoEConfig
from omnivl.architectures import BLIP
from omnivl.architectures.blip_names import from_others
from omnivl.architectures.build import build_chain
from omnivl.architectures.foreign import CLIP_PIXELS
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import ModelError
from omnivl.inference.generate import SearchOptions, generate
from omnivl.inference.predict import predict
from omnivl.objectives import ITC, LM, MLM, VLM, Objective, PrepareContext, UniVLC
from omnivl.parts import attention
from omnivl.parts.sizes import Transformer
from omnivl.pretrained.load import load_pretrained

NEAR = {"rtol": 2e-5, "atol": 2e-5}
POST = Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12)
SMALL = BLIP(
    **{"vision": Transformer(hidden_size=24, num_heads=2, layers=2, norm_eps=1e-5), "text": POST},
    **{"image_size": 16, "patch_size": 8, "text_length": 7, "vocab_size": 50, "projection_size": 8},
)
OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=8, batch_keys="momentum", soft_target_alpha=0.4),
    VLM(),
    LM(label_smoothing=0.0),
)
ENC = 49
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def peer(kind):
    """A class of transformers with random weights."""
    own = {"num_hidden_layers": 2, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {**own, **still, "hidden_size": 16, "intermediate_size": 64, "encoder_hidden_size": 24, "vocab_size": 50}
    text |= {"max_position_embeddings": 7, "bos_token_id": 4, "sep_token_id": 2, "pad_token_id": 0}
    vision = {**own, "hidden_size": 24, "intermediate_size": 96, "image_size": 16, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8, attn_implementation="eager")
    return scattered(kind(config))


def inputs():
    frames = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    token_ids = torch.where(MASK == 1, torch.randint(5, 49, (2, 7)), TOKENS.pad)
    token_ids[:, 0] = TOKENS.cls
    token_ids[0, 3] = token_ids[1, 6] = TOKENS.sep
    return frames, token_ids


def as_released(frames):
    """Pixels as the released code normalises them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_PIXELS.mean, CLIP_PIXELS.std))
    return (frames[:, 0].float() / 255.0 - mean) / std


def make_batch(objectives, size=4, frames=None, token_ids=None):
    if frames is None:
        frames = torch.randint(0, 256, (size, 1, 3, 16, 16), dtype=torch.uint8)
    if token_ids is None:
        token_ids = torch.randint(5, 49, (size, 7))
        token_ids[:, 0], token_ids[:, -1] = TOKENS.cls, TOKENS.sep
        token_ids[0, 4:] = torch.tensor([TOKENS.sep, TOKENS.pad, TOKENS.pad])
    own = torch.arange(len(frames))
    batch = Batch("image_text", frames, token_ids, own, own, own)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


def run(chain, objectives, batch):
    size = len(batch.frames)
    return chain(State.from_batch(batch, plan_layout(objectives, "image_text", size, 1)))


def compare_gradients(chain, model, folder, skipped=()):
    """Every gradient but those of the patch embedding, whose pixels are others, equals that of transformers."""
    theirs = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    wanted = from_others(theirs, folder / "none", SMALL.vision, SMALL.text)
    compared = 0
    for name, parameter in chain.named_parameters():
        if parameter.grad is None or name.startswith("embed.block.visual.patches") or name in skipped:
            continue
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=3e-4, atol=5e-5, msg=name)
        compared += 1
    return compared


def test_matching_and_contrast_equal_transformers(tmp_path):
    torch.manual_seed(0)
    model, objectives = peer(BlipForImageTextRetrieval), (ITC(), VLM())
    model.save_pretrained(tmp_path)
    chain = build_chain(SMALL, objectives, TOKENS)
    report = load_pretrained(chain, SMALL, tmp_path)
    assert report.unexpected == ()
    assert {name for name in report.missing if "_written" not in name} == {"contrast.logit_scale"}
    frames, token_ids = inputs()
    marked = token_ids.clone()
    marked[:, 0] = ENC
    pixels = as_released(frames)
    wanted = model(input_ids=marked, pixel_values=pixels, attention_mask=MASK).itm_score
    torch.testing.assert_close(predict(chain, "vlm", frames, token_ids), wanted[:, 1] - wanted[:, 0], **NEAR)
    similar = model(input_ids=token_ids, pixel_values=pixels, attention_mask=MASK, use_itm_head=False).itm_score
    torch.testing.assert_close(chain.encode_visual(frames) @ chain.encode_text(token_ids).T, similar, **NEAR)
    # A step of two pairs: each negative can only be the other's, so that no draw is left open.
    out = run(chain, objectives, make_batch(objectives, 2, frames, token_ids))
    rows = [(0, 0), (1, 1), (1, 0), (0, 1), (0, 1), (1, 0)]  # (image, text): positive, other image, other text
    images, texts = (torch.tensor(side) for side in zip(*rows, strict=True))
    scores = model(input_ids=marked[texts], pixel_values=pixels[images], attention_mask=MASK[texts]).itm_score
    matching = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 1, 0, 0, 0, 0]))
    torch.testing.assert_close(out["loss/vlm"], matching, **NEAR)
    logits = similar * chain.contrast.scale().detach()
    own = torch.arange(2)
    contrast = sum(torch.nn.functional.cross_entropy(one, own) for one in (logits, logits.T)) / 2
    torch.testing.assert_close(out["loss/itc"], contrast, **NEAR)
    (out["loss/vlm"] + out["loss/itc"]).backward()
    (matching + contrast).backward()
    words = model.text_encoder.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(chain.embed.block.text.mark.grad, words[ENC], rtol=3e-4, atol=5e-5)
    words[ENC] = 0.0
    skipped = ("embed.block.text.mark", "contrast.logit_scale")
    assert compare_gradients(chain, model, tmp_path, skipped) > 60


def test_writing_equals_transformers(tmp_path):
    torch.manual_seed(0)
    model, objectives = peer(BlipForConditionalGeneration), (LM(label_smoothing=0.0),)
    model.save_pretrained(tmp_path)
    chain = build_chain(SMALL, objectives, TOKENS)
    report = load_pretrained(chain, SMALL, tmp_path)
    assert report.unexpected == ()
    frames, token_ids = inputs()
    batch = make_batch(objectives, 2, frames, token_ids)
    out = run(chain, objectives, batch)
    read, targets = batch.prepared["lm/token_ids"], batch.prepared["lm/targets"]
    scores = model(input_ids=read, pixel_values=as_released(frames), attention_mask=(read != 0).long()).logits
    wanted = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(out["loss"], wanted, **NEAR)
    out["loss"].backward()
    wanted.backward()
    tied = (
        model.text_decoder.cls.predictions.decoder.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
    )
    own = ("embed.block.text.words", "losses.vocabulary.decoder.weight") if tied else ()
    assert compare_gradients(chain, model, tmp_path, own) > 50
    if tied:  # the sum of both of ours is the gradient of the one
        both = chain.embed.block.text.words.grad + chain.losses.vocabulary.decoder.weight.grad
        theirs = model.text_decoder.bert.embeddings.word_embeddings.weight.grad
        torch.testing.assert_close(both, theirs, rtol=3e-4, atol=5e-5)


def test_an_exported_model_writes_what_the_chain_writes(tmp_path):
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, OBJECTIVES, TOKENS)).eval()
    foreign = SMALL.to_foreign(chain, TOKENS)
    assert foreign.model == "BlipForConditionalGeneration"
    assert all(name.startswith(("contrast.", "losses.", "embed.", "mixed_", "visual_")) for name in foreign.left_out)
    model = BlipForConditionalGeneration(BlipConfig(**foreign.config)).eval()
    missing, unexpected = model.load_state_dict(foreign.weights, strict=False)
    assert (missing, unexpected) == ([], [])
    frames, _ = inputs()
    mean, std = (torch.tensor(foreign.image_processor[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (frames[:, 0].float() / 255.0 - mean) / std
    options = SearchOptions(start=4, end=2, pad=0, banned=(), max_length=1, num_beams=1)
    scores = model(input_ids=torch.full((2, 1), 4), pixel_values=pixels).logits[:, -1]
    written = generate(chain, "lm", frames, options).token_ids
    assert torch.equal(written[:, 0], scores.argmax(-1))
    # The same weights come back.
    save_file({name: one.contiguous() for name, one in foreign.weights.items()}, tmp_path / "model.safetensors")
    again = build_chain(SMALL, OBJECTIVES, TOKENS)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    load_pretrained(again, SMALL, tmp_path)
    torch.testing.assert_close(
        generate(again.eval(), "lm", frames, options).log_probability,
        generate(chain, "lm", frames, options).log_probability,
    )


def test_blocks_start_from_vit_and_bert(tmp_path):
    torch.manual_seed(0)
    own = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vit = ViTConfig(**own, hidden_size=24, intermediate_size=96, image_size=16, patch_size=8)
    bert = BertConfig(**own, hidden_size=16, intermediate_size=64, vocab_size=50, max_position_embeddings=7)
    peers = scattered(ViTModel(vit, add_pooling_layer=False)), scattered(BertForMaskedLM(bert)).eval()
    for name, model in zip(("vit", "bert"), peers, strict=True):
        model.save_pretrained(tmp_path / name)
    chain = build_chain(SMALL, OBJECTIVES, TOKENS)
    words = load_pretrained(chain, SMALL, tmp_path / "bert")
    assert words.unexpected == ()
    lacking = {name for name in words.missing if name.startswith(("mixed_", "embed.block.text"))}
    assert all(".cross." in name or ".norm2." in name or name.endswith(".mark") for name in lacking)
    assert load_pretrained(chain, SMALL, tmp_path / "vit", part="vision").unexpected == ()
    _, token_ids = inputs()
    hidden = peers[1].bert(token_ids, attention_mask=MASK).last_hidden_state
    x, mask = chain.embed.block.text(token_ids, torch.float32), MASK == 1
    for layer in (chain.mixed_00, chain.mixed_01):
        x = layer.block.read(x, mask, None)
        assert torch.equal(layer.block.attention_written.qkv.weight, layer.block.attention.qkv.weight)
        assert torch.equal(layer.block.norm1_written.bias, layer.block.norm1.bias)
    torch.testing.assert_close(x[mask], hidden[mask], **NEAR)
    wide = replace(SMALL, text=replace(POST, norm="pre"))
    with pytest.raises(ModelError) as caught:
        load_pretrained(build_chain(wide, (), TOKENS), wide, tmp_path / "bert")
    assert "model.text.norm: got 'pre'; allowed 'post' with these weights" in str(caught.value)
    assert "fusion" not in str(caught.value)


def as_published(model):
    """The tensors of a class by the names of the released code."""
    tower = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
    tower |= {"embeddings.patch_embedding": "patch_embed.proj", "post_layernorm": "norm", "encoder.layers": "blocks"}
    block = {"self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj", "layer_norm": "norm"}
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("vision_model."):
            rest = name.removeprefix("vision_model.")
            for theirs, own in (tower | (block if "layers" in rest else {})).items():
                rest = rest.replace(theirs, own)
            name = f"visual_encoder.{rest}"
        found[name] = tensor.clone()
    return found


def test_a_released_file_holds_readers_and_writers(tmp_path):
    """One file with both: what is shared stands in it twice."""
    torch.manual_seed(0)
    reads, writes = peer(BlipForImageTextRetrieval), peer(BlipForConditionalGeneration)
    apart = "attention.self", "attention.output"
    for name, tensor in reads.text_encoder.state_dict().items():
        if not any(f".{part}" in name for part in apart):
            writes.text_decoder.bert.state_dict()[name].copy_(tensor)
    writes.vision_model.load_state_dict(reads.vision_model.state_dict())
    given = as_published(writes) | as_published(reads) | {"temp": torch.tensor(0.05), "image_queue": torch.randn(8, 4)}
    assert "visual_encoder.blocks.1.attn.qkv.weight" in given
    save_file({name: one.contiguous() for name, one in given.items()}, tmp_path / "model.safetensors")
    chain = build_chain(SMALL, OBJECTIVES, TOKENS)
    report = load_pretrained(chain, SMALL, tmp_path)
    assert (report.missing, report.unexpected) == ((), ("image_queue",))
    assert chain.contrast.logit_scale.item() == pytest.approx(-torch.tensor(0.05).log().item())
    frames, token_ids = inputs()
    marked = token_ids.clone()
    marked[:, 0] = ENC
    scores = reads(input_ids=marked, pixel_values=as_released(frames), attention_mask=MASK).itm_score
    torch.testing.assert_close(predict(chain, "vlm", frames, token_ids), scores[:, 1] - scores[:, 0], **NEAR)
    options = SearchOptions(start=4, end=2, pad=0, banned=(), max_length=1, num_beams=1)
    logits = writes(input_ids=torch.full((2, 1), 4), pixel_values=as_released(frames)).logits[:, -1]
    assert torch.equal(generate(chain.eval(), "lm", frames, options).token_ids[:, 0], logits.argmax(-1))


def test_only_self_attention_is_apart():
    """Changing any shared weight changes both readers and writers; the counts are those that the paper gives."""
    with torch.device("meta"):
        chain = build_chain(BLIP(), OBJECTIVES, TOKENS)
    trained = {name: one.numel() for name, one in chain.named_parameters() if one.requires_grad}
    apart = sum(count for name, count in trained.items() if "_written" in name)
    assert apart == 12 * (4 * (768 * 768 + 768) + 2 * 768)
    vision = sum(count for name, count in trained.items() if name.startswith(("visual_", "embed.block.visual.")))
    assert round(vision / 1e6, 2) == 85.80
    blocks = sum(count for name, count in trained.items() if name.startswith("mixed_")) - apart
    words = sum(count for name, count in trained.items() if name.startswith("embed.block.text."))
    # The released code has 512 positions, two token types and no vector apart.
    assert round((blocks + words + (512 - 30 + 2 - 1) * 768 - 768) / 1e6, 1) == 137.3


@pytest.mark.parametrize(
    "objectives",
    [OBJECTIVES, (ITC(),), (LM(),), (ITC(), VLM()), (VLM(),), (MLM(), LM()), (UniVLC(), MLM())],
    ids=lambda objectives: "+".join(one.key for one in objectives),
)
def test_idle_parameters_are_those_without_a_gradient(objectives):
    torch.manual_seed(0)
    chain = build_chain(SMALL, objectives, TOKENS)
    layout = plan_layout(objectives, "image_text", 4, 1)
    out = run(chain, objectives, make_batch(objectives))
    assert out.named("loss").keys() >= {objective.key for objective in objectives}
    out["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([layout])}
    for name, parameter in chain.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad is None) == (id(parameter) in idle), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("objectives", [OBJECTIVES, (LM(),), (ITC(), VLM())])
def test_operations_are_what_torch_counts(monkeypatch, objectives):
    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    wide = replace(SMALL, text=replace(POST, hidden_size=64), projection_size=1)
    chain = build_chain(wide, objectives, TOKENS)
    token_ids = torch.randint(5, 49, (4, 7))
    token_ids[:, -1] = TOKENS.sep
    frames = torch.randint(0, 256, (4, 1, 3, 16, 16), dtype=torch.uint8)
    batch = make_batch(objectives, 4, frames, token_ids)
    layout = plan_layout(objectives, "image_text", 4, 1)
    with FlopCounterMode(display=False) as counter:
        chain(State.from_batch(batch, layout))["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout), rel=1e-2)


def test_losses_fall():
    torch.manual_seed(0)
    objectives = (replace(OBJECTIVES[0], queue_size=0), *OBJECTIVES[1:])
    chain = build_chain(replace(SMALL, text=replace(POST, norm="pre")), objectives, TOKENS)
    optimizer = torch.optim.Adam([p for p in chain.parameters() if p.requires_grad], lr=3e-3)
    batch, runs = make_batch(objectives), []
    for _ in range(80):
        out = run(chain, objectives, batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        chain.after_step()
        runs.append({name: loss.item() for name, loss in out.named("loss").items()})
    assert runs[-1]["lm"] < 0.5 * runs[0]["lm"]
    assert runs[-1]["vlm"] < 0.7 * runs[0]["vlm"]
    assert runs[-1]["univlc"] < 0.9 * runs[0]["univlc"]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_it_writes_with_and_without_a_cache(norm):
    torch.manual_seed(0)
    chain = scattered(build_chain(replace(SMALL, text=replace(POST, norm=norm)), (LM(),), TOKENS)).eval()
    frames, _ = inputs()
    options = SearchOptions(start=4, end=2, pad=0, banned=(1, 3, 4), max_length=6, num_beams=3)
    cached, uncached = (generate(chain, "lm", frames, options, cached=cached) for cached in (True, False))
    assert torch.equal(cached.token_ids, uncached.token_ids)
    torch.testing.assert_close(cached.log_probability, uncached.log_probability)


def test_each_text_is_matched_with_the_image_that_it_is_given():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, OBJECTIVES, TOKENS)).eval()
    frames, token_ids = inputs()
    pairs = predict(chain, "vlm", frames, token_ids)
    crossed = predict(chain, "vlm", frames, token_ids.repeat(2, 1), torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(crossed[:2], pairs)
    assert not torch.allclose(crossed[2:], pairs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 20}, "model.image_size: got 20; allowed a multiple of patch_size 8; change either"),
        ({"vision": {"norm": "post"}}, "model.vision.norm: got 'post'; allowed 'pre' in 'blip'; set it to 'pre'"),
        (
            {"text": {"ffn": LIMoEConfig(every=1)}},
            "model.text.ffn.kind: got 'limoe'; allowed 'dense' in 'blip'; set it to 'dense'; vision may have experts",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(model, message):
    changed = {
        name: replace(getattr(SMALL, name), **value) if isinstance(value, dict) else value
        for name, value in model.items()
    }
    with pytest.raises(ModelError) as caught:
        build_chain(replace(SMALL, **changed), (), TOKENS)
    assert str(caught.value) == message


def test_what_transformers_would_compute_otherwise_is_not_exported():
    chain = build_chain(SMALL, (ITC(),), TOKENS)
    with pytest.raises(ModelError, match="the stage has no head on words, which transformers' BlipForConditional"):
        SMALL.to_foreign(chain, TOKENS)
    pre = replace(SMALL, text=replace(POST, norm="pre"))
    with pytest.raises(
        ModelError, match=r"model\.text: got 'dense' feed-forward layers, layer_scale_init None and norm"
    ):
        pre.to_foreign(build_chain(pre, (LM(),), TOKENS), TOKENS)


def test_weights_of_other_options_are_refused(tmp_path):
    peer(BlipForImageTextRetrieval).save_pretrained(tmp_path)
    other = replace(SMALL, text=replace(POST, num_heads=4))
    with pytest.raises(ModelError, match=r"model\.text\.num_heads: got 4; allowed 2 with these weights"):
        load_pretrained(build_chain(other, (), TOKENS), other, tmp_path)
