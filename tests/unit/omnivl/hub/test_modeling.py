"""Exported models give what the chain gives, through files on disk and the ``Auto`` classes."""

import json
from dataclasses import replace

import pytest
import small_blip2
import small_coca
import small_flamingo
import small_git
import small_pali
import small_simvlm
import torch
from safetensors.torch import load_file, save_file
from tiny_chain import CONFIG, EVERYTHING, TOKENS, make_batch
from transformers import AutoModel

from moe.config import AttributeConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.routers import ExpertChoice, TokenChoice
from omnivl.architectures import Unified, ViLT, VisionConfig
from omnivl.architectures.build import build_chain
from omnivl.errors import ModelError, UserError
from omnivl.hub import OmniVLConfig, OmniVLModel
from omnivl.hub.modeling import MATCHING, WRITING
from omnivl.inference.generate import SearchOptions, caption_search, generate
from omnivl.inference.predict import predict
from omnivl.objectives import ITC, ITM, LM, MLM, VLM, VQA, Answer, SplitLM, UniVLC
from omnivl.parts.sizes import Transformer, Words
from omnivl.pretrained.load import read_exported

TOWERS = (UniVLC(queue_size=16, temperature=0.1), MLM(), VLM(), LM(), *EVERYTHING[1:4])
UNIFIED = (UniVLC(), MLM(), VLM())
FILLINGS = {
    "dense": CONFIG.ffn,
    "mome": MoMEConfig(shared={"vision": ("image", "video")}, fusion_from=1),
    "limoe": LIMoEConfig(num_experts=4, every=1, router=TokenChoice(selection_bias_rate=0.01)),
    "expert choice": LIMoEConfig(num_experts=4, every=1, router=ExpertChoice()),
    "mome_limoe": MoMELIMoEConfig(every=1, pools={"image": 2, "text": 2}, common_experts=2),
    "attribute": AttributeConfig(num_experts=3, every=1),
}


def exported(tmp_path, config, objectives):
    """A chain with weights away from their tame start, and the same as a loaded folder."""
    torch.manual_seed(0)
    chain = build_chain(config, objectives, TOKENS).eval()
    with torch.no_grad():
        for tensor in chain.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor))
    model = OmniVLModel(OmniVLConfig.of(config, objectives, TOKENS))
    own = model.chain.state_dict()
    model.chain.load_state_dict({name: tensor for name, tensor in chain.state_dict().items() if name in own})
    model.save_pretrained(tmp_path)
    return chain, AutoModel.from_pretrained(tmp_path)


def check_equal(chain, model, *, writes):
    near = {"rtol": 1e-5, "atol": 1e-6}
    images, clips = make_batch("image_text"), make_batch("video_text")
    texts = images.token_ids
    mask = (texts != TOKENS.pad).long()
    inputs = {"input_ids": texts, "attention_mask": mask}
    with torch.no_grad():
        image = model.get_image_features(images.frames[:, 0])
        torch.testing.assert_close(image.pooler_output, chain.encode_visual(images.frames), **near)
        torch.testing.assert_close(image.last_hidden_state, chain.features(images.frames), **near)
        video = model.get_video_features(clips.frames).pooler_output
        torch.testing.assert_close(video, chain.encode_visual(clips.frames), **near)
        text = model.get_text_features(**inputs).pooler_output
        torch.testing.assert_close(text, chain.encode_text(texts), **near)
        out = model(**inputs, pixel_values_videos=clips.frames, use_itm_head=True)
        wanted = chain.contrast.scale() * video @ text.t()
        torch.testing.assert_close(out.logits_per_image, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.itm_score, predict(chain, "vlm", clips.frames, texts), rtol=1e-5, atol=1e-5)
        if writes:
            banned = tuple(i for i in range(TOKENS.num_reserved) if i != TOKENS.sep)
            options = SearchOptions(TOKENS.decode, TOKENS.sep, TOKENS.pad, banned, 7, num_beams=2)
            own = model.generate(images.frames[:, 0], num_beams=2)
            assert torch.equal(own, generate(chain, "lm", images.frames, options).token_ids)


@pytest.mark.parametrize("filling", FILLINGS)
def test_towers_give_what_the_chain_gives(tmp_path, filling):
    objectives = tuple(one for one in TOWERS if filling != "expert choice" or one.key != "lm")
    chain, model = exported(tmp_path, replace(CONFIG, ffn=FILLINGS[filling]), objectives)
    assert not model.training
    check_equal(chain, model, writes=filling != "expert choice")


@pytest.mark.parametrize("multiway", [False, True])
@pytest.mark.parametrize("filling", FILLINGS)
def test_the_unified_transformer_gives_what_the_chain_gives(tmp_path, filling, multiway):
    config = replace(Unified.like(CONFIG), multiway=multiway, ffn=FILLINGS[filling], layer_scale_init=0.1)
    check_equal(*exported(tmp_path, config, UNIFIED), writes=False)


def test_attention_experts_and_options_of_the_towers(tmp_path):
    config = replace(Unified.like(CONFIG), ffn=AttributeConfig(num_experts=3, every=1, attention=True))
    check_equal(*exported(tmp_path / "unified", config, UNIFIED), writes=False)
    config = replace(CONFIG, text_norm="post", layer_scale_init=0.1, tubelet_size=2, temporal_gain=0.5)
    check_equal(*exported(tmp_path / "towers", config, TOWERS), writes=True)
    config = replace(CONFIG, vision=VisionConfig("quick_gelu", 1e-5, True, True), ffn=FILLINGS["mome"])
    check_equal(*exported(tmp_path / "details", config, TOWERS), writes=True)


def test_questions_are_answered_as_by_the_chain(tmp_path):
    objectives = (VQA(answers=("red", "blue")), Answer(length=6))
    chain, model = exported(tmp_path, CONFIG, objectives)
    assert tuple(model.chain.objectives.values()) == objectives
    images = make_batch("image_text", ())
    texts, pixels = images.token_ids, images.frames[:, 0]
    inputs = {"input_ids": texts, "attention_mask": (texts != TOKENS.pad).long(), "pixel_values": pixels}
    with torch.no_grad():
        chosen = model.answer_logits(**inputs)
        torch.testing.assert_close(chosen, predict(chain, "vqa", images.frames, texts), rtol=1e-5, atol=1e-6)
        options = caption_search(TOKENS, 7)
        wanted = generate(chain, "answer", images.frames, options, token_ids=texts).token_ids
        assert torch.equal(model.generate(**inputs), wanted)
    with pytest.raises(ModelError, match="write captions: got a model without the head of lm"):
        model.generate(pixels)


def test_a_part_of_an_exported_model_fills_that_part(tmp_path):
    _, model = exported(tmp_path, CONFIG, TOWERS)
    given = {name: tensor for name, tensor in model.chain.state_dict().items() if tensor.is_floating_point()}
    parts = {part: read_exported(tmp_path, part) for part in ("all", "vision", "text")}
    assert parts["all"].keys() == given.keys()
    assert all(torch.equal(tensor, given[name]) for name, tensor in parts["all"].items())
    stacks = {part: {name.split(".")[0].rstrip("0123456789") for name in found} for part, found in parts.items()}
    assert stacks["vision"] == {"embed", "visual_", "visual_norm", "contrast"}
    assert stacks["text"] == {"embed", "text_", "contrast"}
    assert parts["vision"].keys().isdisjoint(parts["text"])
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert read_exported(tmp_path, "all") is None


def test_the_loss_is_clips_and_leads_back_to_all_that_embeds(tmp_path):
    _, model = exported(tmp_path, CONFIG, TOWERS)
    batch = make_batch("image_text")
    out = model.train()(batch.token_ids, pixel_values=batch.frames[:, 0], return_loss=True)
    logits, own = out.logits_per_image, torch.arange(4)
    wanted = -(logits.log_softmax(1)[own, own] + logits.log_softmax(0)[own, own]).mean() / 2
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = (
        "embed.block.visual.patches.weight",
        "visual_00.block.attention.qkv.weight",
        "text_01.block.ffn.fc1.weight",
    )
    assert {f"chain.{part}" for part in (*parts, "contrast.logit_scale")} <= trained


def test_a_hidden_token_is_no_token(tmp_path):
    _, model = exported(tmp_path, CONFIG, TOWERS)
    texts = make_batch("image_text").token_ids
    mask = torch.ones_like(texts)
    mask[:, 4:] = 0
    shorter = texts.clone()
    shorter[:, 4:] = TOKENS.pad
    wanted = model.get_text_features(shorter).pooler_output
    assert torch.equal(model.get_text_features(texts, mask).pooler_output, wanted)
    assert not torch.allclose(model.get_text_features(texts).pooler_output, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    _, model = exported(tmp_path, replace(CONFIG, ffn=FILLINGS["mome_limoe"]), TOWERS)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    batch = make_batch("video_text")
    out = half(batch.token_ids, pixel_values_videos=batch.frames)
    assert out.logits_per_text.dtype == torch.float32
    wanted = model(batch.token_ids, pixel_values_videos=batch.frames)
    similarity = (out.image_embeds * wanted.image_embeds).sum(-1)
    assert similarity.min() > 0.99
    assert half.get_video_features(batch.frames).last_hidden_state.dtype == dtype


def test_shards_are_read_as_one(tmp_path):
    _, model = exported(tmp_path / "whole", CONFIG, TOWERS)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, tensor in OmniVLModel.from_pretrained(tmp_path / "parts").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_weights_that_are_not_there_are_never_drawn(tmp_path):
    exported(tmp_path, CONFIG, TOWERS)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["chain.visual_01.block.norm1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    wanted = r"weights that do not fill the model of its config.json: chain.visual_01.block.norm1.weight \(1 in all\)"
    with pytest.raises(ModelError, match=wanted):
        AutoModel.from_pretrained(tmp_path)


def test_a_configuration_is_read_back_as_it_was(tmp_path):
    config = replace(CONFIG, ffn=FILLINGS["mome_limoe"])
    OmniVLConfig.of(config, TOWERS, TOKENS).save_pretrained(tmp_path)
    read = OmniVLConfig.from_pretrained(tmp_path)
    assert read.sizes == replace(config, momentum=None)
    assert read.tokens == TOKENS
    assert [one.key for one in read.objectives] == ["univlc", "mlm", "vlm", "lm"]
    assert OmniVLConfig().sizes.hidden_size == 768, "without arguments: the base preset"


def test_heads_keep_their_options_and_names_and_folders_of_before_are_read():
    itc = ITC(loss_type="sigmoid", name="pairs", weight=0.5, on=("cats",))
    config = OmniVLConfig.of(CONFIG, (itc, replace(VLM(), name="second"), MLM()), TOKENS)
    assert config.objectives == (replace(itc, weight=1.0, on=()), VLM(name="second"), MLM())
    model = OmniVLModel(config)
    assert "losses.heads.pairs.bias" in model.chain.state_dict()
    assert model.head(MATCHING) == "second" and model.head(WRITING) is None
    earlier = OmniVLConfig(
        model=config.model, heads=["vlm", "lm"], special_tokens=config.special_tokens, temperature_bounds=[0.1, 0.5]
    )
    univlc = UniVLC(temperature=0.1, temperature_bounds=(0.1, 0.5))
    assert earlier.objectives == (univlc, VLM(), LM())
    assert "temperature_bounds" not in earlier.to_dict(), "it is said once"


def test_an_architecture_without_embeddings_matches(tmp_path):
    blocks = Transformer(hidden_size=16, num_heads=2, layers=2)
    words = Words(length=8, vocab_size=TOKENS.vocab_size)
    config = ViLT(blocks=blocks, words=words, image_size=16, patch_size=8)
    chain, model = exported(tmp_path, config, (MLM(), ITM()))
    batch = make_batch("image_text")
    pixels, texts = batch.frames[:, 0], batch.token_ids
    with torch.no_grad():
        wanted = predict(chain, "itm", batch.frames, texts)
        torch.testing.assert_close(model.match(texts, pixel_values=pixels), wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(ModelError, match=r"^embeddings: got architecture 'vilt', which has fused, fused_visual; "):
            model.get_image_features(pixels)
        with pytest.raises(ModelError, match=r"^embeddings: got architecture 'vilt'"):
            model(texts, pixel_values=pixels, use_itm_head=True)


def test_an_architecture_with_several_embeddings_of_an_image_compares_by_the_most_alike(tmp_path):
    objectives = (ITC(), VLM(), LM())
    chain, model = exported(tmp_path, small_blip2.SMALL, objectives)
    batch = small_blip2.make_batch(objectives)
    pixels, texts = batch.frames[:, 0], batch.token_ids
    with torch.no_grad():
        out = model(texts, pixel_values=pixels, use_itm_head=True)
        torch.testing.assert_close(out.image_embeds, chain.encode_visual(batch.frames), rtol=1e-5, atol=1e-5)
        wanted = chain.contrast.scale() * (out.image_embeds @ out.text_embeds.t()).amax(1)
        torch.testing.assert_close(out.logits_per_image, wanted, rtol=1e-5, atol=1e-5)
        matches = predict(chain, "vlm", batch.frames, texts)
        torch.testing.assert_close(out.itm_score, matches, rtol=1e-5, atol=1e-5)


def test_coca_embeds_and_writes(tmp_path):
    config = replace(small_coca.SMALL, vocab_size=TOKENS.vocab_size)
    objectives = (ITC(), LM())
    chain, model = exported(tmp_path, config, objectives)
    batch = make_batch("image_text")
    pixels, texts = batch.frames[:, 0], batch.token_ids
    with torch.no_grad():
        out = model(texts, pixel_values=pixels)
        torch.testing.assert_close(out.image_embeds, chain.encode_visual(batch.frames), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.text_embeds, chain.encode_text(texts), rtol=1e-5, atol=1e-5)
        states = model.get_text_features(texts).last_hidden_state
        assert states.shape == (*texts.shape, 12)
        wanted = generate(chain, "lm", batch.frames, caption_search(TOKENS, 7)).token_ids
        assert torch.equal(model.generate(pixels), wanted)


@pytest.mark.parametrize("name", ["git", "simvlm", "pali"])
def test_what_only_writes(tmp_path, name):
    config = {"git": small_git.SMALL, "simvlm": small_simvlm.SMALL, "pali": small_pali.SMALL}[name]
    config, key = replace(config, vocab_size=TOKENS.vocab_size), "lm" if config.kind == "git" else "split_lm"
    chain, model = exported(tmp_path, config, (LM() if key == "lm" else SplitLM(),))
    batch = make_batch("image_text")
    side = config.image_size // 16  # of a picture of 16 pixels
    frames = batch.frames.repeat_interleave(side, dim=-1).repeat_interleave(side, dim=-2)
    options, beginning = caption_search(TOKENS, 7), torch.tensor([[TOKENS.cls, TOKENS.sep]] * len(frames))
    with torch.no_grad():
        wanted = generate(chain, key, frames, options, token_ids=None if key == "lm" else beginning).token_ids
        assert torch.equal(model.generate(frames[:, 0]), wanted)
        if key == "split_lm":
            begun = batch.token_ids
            wanted = generate(chain, key, frames, options, token_ids=begun).token_ids
            assert torch.equal(model.generate(frames[:, 0], input_ids=begun), wanted)
        with pytest.raises(ModelError, match=f"^embeddings: got architecture '{config.kind}'"):
            model.get_image_features(frames[:, 0])


@pytest.mark.parametrize(
    ("config", "objective"),
    [(small_flamingo.FLAMINGO, small_flamingo.INTERLEAVED), (small_flamingo.FROZEN, small_flamingo.PREFIX)],
    ids=["flamingo", "frozen"],
)
def test_language_models_that_see_pictures_are_whole_but_do_not_write(tmp_path, config, objective):
    config = replace(config, language=replace(config.language, vocab_size=TOKENS.vocab_size))
    chain, model = exported(tmp_path, config, (objective,))
    own = dict(model.chain.named_parameters())
    assert own.keys() == dict(chain.named_parameters()).keys()
    assert all(torch.equal(one, own[name]) for name, one in chain.named_parameters())
    message = rf"^write captions: got a model without the head of lm or split_lm \(it has {objective.kind}\)"
    with pytest.raises(ModelError, match=message):
        model.generate(small_flamingo.caption_batch().frames[:, 0])


def test_errors_say_what_to_do(tmp_path):
    config = OmniVLConfig.of(CONFIG, (UniVLC(),), TOKENS)
    model, batch = OmniVLModel(config), make_batch("image_text")
    pixels = batch.frames[:, 0]
    with pytest.raises(
        ModelError, match=r"^write captions: got a model without the head of lm or split_lm \(it has univlc\)"
    ):
        model.generate(pixels)
    with pytest.raises(ModelError, match=r"^match: got a model without the head of vlm or itm"):
        model(batch.token_ids, pixel_values=pixels, use_itm_head=True)
    with pytest.raises(ModelError, match=r"^pixel_values: got float32 \[4, 3, 16, 16\]; allowed uint8 \[B, 3, H, W\]"):
        model.get_image_features(pixels.float())
    with pytest.raises(ModelError, match=r"^pixel_values, pixel_values_videos: got both; allowed is one of the two"):
        model(batch.token_ids, pixel_values=pixels, pixel_values_videos=batch.frames)
    with pytest.raises(ModelError, match=r"^pixel_values, pixel_values_videos: got neither"):
        model()
    with pytest.raises(ModelError, match=r"^config.json: model: hiden_size: Unexpected keyword argument; allowed"):
        OmniVLModel(OmniVLConfig(model={"hiden_size": 16}))
    with pytest.raises(
        ModelError, match=r"^config.json: heads: Input tag 'seg' found using 'kind' does not match any of .*'mlm'"
    ):
        OmniVLModel(OmniVLConfig(model=config.model, heads=["seg"], special_tokens=config.special_tokens))
    writing = OmniVLModel(OmniVLConfig.of(CONFIG, (LM(),), TOKENS))
    with pytest.raises(ModelError, match=r"^max_new_tokens: got 8; allowed 1 to 7"):
        writing.generate(pixels, max_new_tokens=8)
    prompted = OmniVLModel(OmniVLConfig.of(CONFIG, (LM(prompt="a picture of"),), TOKENS))
    with pytest.raises(
        ModelError, match=r"^generate: captions stand behind the prompt 'a picture of', .*; use omnivl\.load"
    ):
        prompted.generate(pixels)


def test_generate_takes_the_arguments_of_a_search_and_refuses_others_by_name():
    torch.manual_seed(0)
    model, pixels = OmniVLModel(OmniVLConfig.of(CONFIG, (LM(),), TOKENS)).eval(), make_batch("image_text").frames[:, 0]
    plain = model.generate(pixels)
    neutral = {"do_sample": False, "num_return_sequences": 1, "early_stopping": False, "use_cache": True}
    assert torch.equal(model.generate(pixels, **neutral, temperature=None), plain)
    longer = model.generate(pixels, num_beams=2, min_new_tokens=7)
    assert longer.shape[1] == 7
    assert not (longer == TOKENS.sep).any()
    once = model.generate(pixels, repetition_penalty=100.0, min_new_tokens=7)
    assert all(len(set(row)) == 7 for row in once.tolist())
    known = (
        "pixel_values, pixel_values_videos, input_ids, attention_mask, max_new_tokens, num_beams, min_new_tokens, "
        "length_penalty, repetition_penalty"
    )
    for arguments, message in (
        ({"num_beam": 2}, f"an argument 'num_beam'; allowed are {known}; did you mean 'num_beams'?"),
        ({"max_length": 5}, f"an argument 'max_length'; allowed are {known}; give max_new_tokens"),
        ({"min_length": 5}, f"an argument 'min_length'; allowed are {known}; give min_new_tokens"),
        ({"bad_words_ids": [[3]]}, f"an argument 'bad_words_ids'; allowed are {known}; leave it out"),
    ):
        with pytest.raises(ModelError) as error:
            model.generate(pixels, **arguments)
        assert str(error.value) == f"generate: got {message}"
    for name, value, allowed in (
        ("do_sample", True, "False or None"),
        ("early_stopping", True, "False or None"),
        ("early_stopping", "never", "False or None"),
        ("num_return_sequences", 2, "1 or None"),
        ("temperature", 0.7, "1.0 or 1 or None"),
        ("no_repeat_ngram_size", 2, "0 or None"),
    ):
        with pytest.raises(ModelError) as error:
            model.generate(pixels, **{name: value})
        wanted = f"generate: {name}: got {value!r}; allowed {allowed}, by greedy or beam search; leave it out"
        assert str(error.value) == wanted
    with pytest.raises(UserError, match="min_length: got 8; allowed 0 to 7"):
        model.generate(pixels, min_new_tokens=8)


def test_a_configuration_of_before_routers_had_options_of_their_own_is_read():
    config = OmniVLConfig.of(replace(CONFIG, ffn=LIMoEConfig(num_experts=4)), (UniVLC(),), TOKENS)
    assert config.sizes.ffn.router == TokenChoice()
    earlier = {**config.model, "ffn": {"kind": "limoe", "num_experts": 4, "routing": "token_choice", "top_k": 2}}
    read = OmniVLConfig(model=earlier, special_tokens=config.special_tokens)
    assert read.sizes.ffn == LIMoEConfig(num_experts=4, router=TokenChoice(top_k=2))
