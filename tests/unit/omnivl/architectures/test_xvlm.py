"""X-VLM: its image encoder's end, released names, an exchanged text encoder, what it predicts and refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_towers import scattered
from small_xvlm import CONFIG, OBJECTIVES, TOKENS, collated, examples
from transformers import XLMRobertaConfig, XLMRobertaModel

from omnivl.architectures.build import build_chain
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.names import stack_of
from omnivl.chain.state import State
from omnivl.errors import ModelError
from omnivl.inference.predict import predict
from omnivl.objectives import ITC, MLM, VLM
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import MomentumConfig
from omnivl.pretrained.load import load_pretrained

WHOLE = (ITC(), VLM(), MLM(probability=0.5))


def chain_of(objectives=OBJECTIVES, config=CONFIG):
    torch.manual_seed(0)
    return scattered(build_chain(config, objectives, TOKENS)).eval()


def before_losses(chain, frames, token_ids, kind="image_text"):
    reads = frozenset({"visual", "text", "visual_embedding", "text_embedding"})
    asked = {"all": Demands(joins={"all": Join()}, reads=reads)}
    layout = lay_out(asked, kind, len(frames), frames.shape[1], "predict")
    state = State({"frames": frames, "token_ids": token_ids}, layout)
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


def test_a_picture_is_the_mean_of_its_patches():
    chain = chain_of(WHOLE)
    batch = collated(examples(4), WHOLE)
    state = before_losses(chain, batch.frames, batch.token_ids)
    visual = state["visual/clean"]
    torch.testing.assert_close(visual[:, 0], visual[:, 1:].mean(1))
    projected = chain.named_layers["contrast"].visual_projection(visual[:, 1:].mean(1))
    torch.testing.assert_close(state["visual_embedding"], F.normalize(projected, dim=-1))


def test_an_embedding_is_that_of_patches_where_nothing_else_is_read():
    chain = chain_of(WHOLE)
    batch = collated(examples(4), WHOLE)
    wanted = before_losses(chain, batch.frames, batch.token_ids)
    torch.testing.assert_close(chain.encode_visual(batch.frames), wanted["visual_embedding"])
    torch.testing.assert_close(chain.encode_text(batch.token_ids), wanted["text_embedding"])


def test_a_clip_is_the_mean_of_its_frames_and_as_long_as_one():
    chain = chain_of(WHOLE)
    batch = collated(examples(4, clips=True), WHOLE, "video_text")
    clips = batch.frames
    made = before_losses(chain, clips, batch.token_ids, "video_text")["visual/clean"]
    frames = [before_losses(chain, clips[:, place, None], batch.token_ids)["visual/clean"] for place in range(3)]
    marks = chain.named_layers["visual_regions"].block.times
    torch.testing.assert_close(made, torch.stack(frames).mean(0) + marks.mean(0))
    layout = plan_layout(WHOLE, "video_text", 4, 3)
    chain.train()(State.from_batch(batch, layout))["loss"].backward()
    assert marks.grad is not None
    assert marks.grad.abs().min() > 0


def test_regions_cost_their_texts_and_keys_and_not_the_encoder_again():
    chain = chain_of((*WHOLE[:1], *OBJECTIVES[1:]))
    one, more = (
        {
            name: layer.flops(plan_layout((replace(OBJECTIVES[2], regions=regions),), "image_text", 4, 1), None)
            for name, layer in chain.named_layers.items()
        }
        for regions in (1, 3)
    )
    assert one["visual_00"] == more["visual_00"] > 0
    assert more["text_00"] == 2 * one["text_00"]
    # Keys and values of 4 pictures, and of 4 * 2 or 4 * 4 rows of regions, over 17 positions each.
    keys = 17 * 2.0 * 24 * 32
    passes = chain.named_layers["alignment_00"].backward.passes
    rows = one["alignment_00"] / passes - 12 * keys
    assert more["alignment_00"] / passes == pytest.approx(2 * rows + 20 * keys)
    assert chain_flops(chain, plan_layout(OBJECTIVES, "image_text", 4, 1)) > 0


def released(chain):
    """The chain's weights, but for frames, by the names of the released code with a ViT."""
    own, found = dict(chain.named_parameters()), {}

    def linear(theirs, ours, names=("weight", "bias")):
        found.update({f"{theirs}.{end}": own[f"{ours}.{end}"].data for end in names})

    def split(theirs, ours, slots):
        for end in ("weight", "bias"):
            for slot, rows in zip(slots, own[f"{ours}.{end}"].data.chunk(len(slots)), strict=True):
                found[f"{theirs}.{slot}.{end}"] = rows

    width = CONFIG.vision.hidden_size
    found["vision_encoder.cls_token"] = own["embed.block.visual.class_token"].data.view(1, 1, width)
    found["vision_encoder.pos_embed"] = own["embed.block.visual.positions"].data[None]
    patches = own["embed.block.visual.patches.weight"].data
    found["vision_encoder.patch_embed.proj.weight"] = patches.view(width, 3, CONFIG.patch_size, CONFIG.patch_size)
    found["vision_encoder.patch_embed.proj.bias"] = own["embed.block.visual.patches.bias"].data
    linear("vision_encoder.norm", "visual_norm.block")
    timm = {"attn.qkv": "attention.qkv", "attn.proj": "attention.out", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    for index in range(CONFIG.vision.layers):
        for theirs, ours in ({"norm1": "norm1", "norm2": "norm2"} | timm).items():
            linear(f"vision_encoder.blocks.{index}.{theirs}", f"visual_{index:02d}.block.{ours}")
    bert = "text_encoder.bert."
    found[f"{bert}embeddings.word_embeddings.weight"] = own["embed.block.text.words"].data
    found[f"{bert}embeddings.position_embeddings.weight"] = own["embed.block.text.positions"].data
    found[f"{bert}embeddings.token_type_embeddings.weight"] = torch.zeros(2, CONFIG.text.hidden_size)
    linear(f"{bert}embeddings.LayerNorm", "embed.block.text.norm")
    for index in range(4):
        ours = f"text_{index:02d}.block" if index < 2 else f"alignment_{index - 2:02d}.block"
        theirs = f"{bert}encoder.layer.{index}"
        split(f"{theirs}.attention.self", f"{ours}.attention.qkv", ("query", "key", "value"))
        linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        linear(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm1")
        if index >= 2:
            linear(f"{theirs}.crossattention.self.query", f"{ours}.cross.q")
            split(f"{theirs}.crossattention.self", f"{ours}.cross.kv", ("key", "value"))
            linear(f"{theirs}.crossattention.output.dense", f"{ours}.cross.out")
            linear(f"{theirs}.crossattention.output.LayerNorm", f"{ours}.norm2")
        linear(f"{theirs}.intermediate.dense", f"{ours}.ffn.fc1")
        linear(f"{theirs}.output.dense", f"{ours}.ffn.fc2")
        linear(f"{theirs}.output.LayerNorm", f"{ours}.norm{3 if index >= 2 else 2}")
    linear("text_encoder.cls.predictions.transform.dense", "losses.vocabulary.transform")
    linear("text_encoder.cls.predictions.transform.LayerNorm", "losses.vocabulary.norm")
    linear("text_encoder.cls.predictions.decoder", "losses.vocabulary.decoder", ("weight",))
    found["text_encoder.cls.predictions.bias"] = own["losses.vocabulary.decoder.bias"].data
    linear("vision_proj", "contrast.visual_projection")
    linear("text_proj", "contrast.text_projection")
    for theirs, ours in (("itm_head", "vlm"), ("bbox_head", "locate")):
        for place, name in ((0, "hidden"), (1, "norm"), (3, "output")):
            linear(f"{theirs}.{place}", f"losses.heads.{ours}.{name}")
    found["temp"] = (-own["contrast.logit_scale"].data).exp().view(())
    found["absolute_frame_pos_embed"] = own["visual_regions.block.times"].data[None, :, None]
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def test_the_released_names_are_read(tmp_path):
    given = chain_of()
    save_file(released(given), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    chain = scattered(build_chain(CONFIG, OBJECTIVES, TOKENS))
    report = load_pretrained(chain, CONFIG, tmp_path)
    assert not report.missing
    assert not report.unexpected
    wanted = dict(given.named_parameters())
    for name, parameter in chain.named_parameters():
        if not name.startswith("embed.block.visual.patches"):  # pixels are normalised in another way
            torch.testing.assert_close(parameter, wanted[name], msg=name)


def test_its_text_encoder_may_be_xlm_roberta(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-5}
    peer = scattered(XLMRobertaModel(XLMRobertaConfig(
        **sizes, **options, vocab_size=40, max_position_embeddings=8, type_vocab_size=1, pad_token_id=1,
        attn_implementation="eager",
    ), add_pooling_layer=False)).eval()  # fmt: skip
    peer.save_pretrained(tmp_path)
    tokens = replace(TOKENS, pad=1, cls=0)
    config = replace(CONFIG, text=replace(CONFIG.text, norm_eps=1e-5))
    chain = scattered(build_chain(config, WHOLE, tokens)).eval()
    before = {name: one.clone() for name, one in chain.named_parameters()}
    load_pretrained(chain, config, tmp_path, "text")
    token_ids = torch.tensor([[0, 7, 8, 9, 2, 1], [0, 9, 2, 1, 1, 1]])
    mask = token_ids != 1
    frames = torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)
    own = before_losses(chain, frames, token_ids)["text/clean"]
    wanted = peer(token_ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(own[mask], wanted[mask], rtol=2e-5, atol=2e-5)
    changed = [name for name, one in chain.named_parameters() if not one.equal(before[name])]
    assert {stack_of(name) for name in changed} == {"embed", "text"}


def test_heads_trained_on_regions_predict_of_whole_pictures():
    chain, batch = chain_of(), collated(examples(4), WHOLE)
    for key, shape in (("locate", (4, 4)), ("vlm", (4,))):
        made = predict(chain, key, batch.frames, batch.token_ids)
        assert made.shape == shape
        assert torch.isfinite(made).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": "native"}, "model.sizes: got 'native'; allowed 'fixed' or 'stretched': boxes are cut from square"),
        ({"momentum": MomentumConfig()}, "model.momentum: got momentum twins; allowed null in 'xvlm', which has none"),
        ({"patch_size": 3}, "model.image_size: got 8; allowed a multiple of patch_size 3; change either"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ModelError) as caught:
        build_chain(replace(CONFIG, **changes), WHOLE, TOKENS)
    assert message in str(caught.value)
