"""BLIP-2's second stage: a language model behind the queries, against transformers' class through files on disk."""

from dataclasses import replace

import pytest
import torch
from small_blip2 import SMALL, peer
from small_language import LetterTokenizer
from small_towers import TOKENS, scattered
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

from engine.step.freeze import freeze, freeze_idle, store_frozen
from omnivl.architectures.base import missing_streams
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.positions import IGNORED
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.tokenizer import load_readers
from omnivl.errors import ModelError
from omnivl.inference.generate import generate, writing_search
from omnivl.objectives import PrefixLM, PrepareContext
from omnivl.parts.language import LanguageModel
from omnivl.parts.sizes import Transformer
from omnivl.pretrained.load import load_pretrained

BLOCKS = Transformer(hidden_size=24, num_heads=2, layers=2, activation="relu", norm_eps=1e-5)
WRITER = replace(SMALL, language=LanguageModel(BLOCKS, vocab_size=50, positions=20, length=7))
OBJECTIVE = PrefixLM()
READERS = load_readers(WRITER.text_inputs, LetterTokenizer())
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
NEAR = {"rtol": 2e-5, "atol": 2e-5}


def writer():
    """Transformers' second stage of the small model."""
    first = peer().config
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "ffn_dim": 96, "num_attention_heads": 2, "vocab_size": 50}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = OPTConfig(**sizes, **ids, max_position_embeddings=20, dropout=0.0, word_embed_proj_dim=24)
    parts = {"vision_config": first.vision_config, "qformer_config": first.qformer_config, "text_config": text}
    config = Blip2Config(
        **{name: part.to_dict() for name, part in parts.items()},
        num_query_tokens=WRITER.num_queries,
        image_token_index=49,
    )
    config.qformer_config.use_qformer_text_input = False
    return scattered(Blip2ForConditionalGeneration(config)).train()


def state_of(captions=("abc", "z")):
    torch.manual_seed(1)
    frames, own = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8), torch.arange(2)
    batch = Batch("image_text", frames, own[:, None], own, own, own, captions=captions)
    prepared = OBJECTIVE.prepare(batch, PrepareContext(0, "test", TOKENS, (2, 2), 0, readers=READERS))
    return State.from_batch(replace(batch, prepared=prepared), plan_layout((OBJECTIVE,), "image_text", 2, 1))


def test_losses_and_gradients_of_the_second_stage_equal_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = writer()
    theirs.save_pretrained(tmp_path)
    chain = build_chain(WRITER, (OBJECTIVE,), TOKENS)
    report = load_pretrained(chain, WRITER, tmp_path)
    assert report.unexpected == ()
    state = state_of()
    own = chain(state)["loss"]
    own.backward()
    ids, mask = state["prefix_lm/token_ids"], state["prefix_lm/mask"]
    targets = torch.full_like(ids, IGNORED)
    targets[:, 1:] = state["prefix_lm/targets"][:, :-1]
    before = torch.full((2, WRITER.num_queries), 49)
    wanted = theirs(
        pixel_values=(state["frames"][:, 0].float() / 255 - MEAN) / STD,
        input_ids=torch.cat([before, ids], dim=1),
        attention_mask=torch.cat([torch.ones_like(before), mask.long()], dim=1),
        labels=torch.cat([torch.full_like(before, IGNORED), targets], dim=1),
    ).loss
    wanted.backward()
    torch.testing.assert_close(own, wanted, **NEAR)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = WRITER.from_foreign(gradients, tmp_path)
    found = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, gradient in expected.items() if gradient.any()}
    assert {"prefix.block.weight", "language_embed.block.words", "embed.block.queries"} <= found.keys()
    for name in found.keys() - {"embed.block.visual.patches.weight", "embed.block.visual.patches.bias"}:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=3e-5, msg=name)
    resting = {id(one) for layer in chain.layers for one in layer.idle_parameters([state.layout])}
    assert resting == {id(one) for one in chain.parameters() if one.grad is None}


@pytest.mark.parametrize("beams", [1, 2])
def test_captions_with_a_cache_are_those_without(beams):
    torch.manual_seed(0)
    chain = scattered(build_chain(WRITER, (OBJECTIVE,), TOKENS)).eval()
    writing = OBJECTIVE.writing(READERS["language"], READERS)
    frames, options = state_of()["frames"], writing_search(writing, beams)
    cached, whole = (generate(chain, "prefix_lm", frames, options, cached=kept) for kept in (True, False))
    assert torch.equal(cached.token_ids, whole.token_ids)
    torch.testing.assert_close(cached.log_probability, whole.log_probability, **NEAR)
    other = generate(chain, "prefix_lm", frames.flip(0), options)
    torch.testing.assert_close(cached.log_probability, other.log_probability.flip(0), **NEAR)
    assert not torch.isclose(cached.log_probability[0], cached.log_probability[1])


def test_without_a_language_model_there_is_no_such_stream():
    assert missing_streams(SMALL, OBJECTIVE) == ["language"]
    assert missing_streams(WRITER, OBJECTIVE) == []


def test_an_opt_of_other_options_is_refused(tmp_path):
    writer().language_model.save_pretrained(tmp_path)
    chain = build_chain(WRITER, (OBJECTIVE,), TOKENS)
    report = load_pretrained(chain, WRITER, tmp_path, part="language")
    assert (report.missing, report.unexpected) == ((), ())
    other = replace(WRITER, language=replace(WRITER.language, blocks=replace(BLOCKS, num_heads=4)))
    with pytest.raises(ModelError, match=r"model\.language\.blocks\.num_heads: got 4; allowed 2 with these weights"):
        load_pretrained(chain, other, tmp_path, part="language")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_tower_is_kept_in_bf16_and_computes_what_its_rounded_weights_do(dtype):
    torch.manual_seed(0)
    halved = replace(WRITER, vision=replace(WRITER.vision, frozen_dtype="bf16"))
    chain, rounded = (
        scattered(build_chain(model, (OBJECTIVE,), TOKENS, compute_dtype=dtype)) for model in (halved, WRITER)
    )
    rounded.load_state_dict(chain.state_dict())
    state = state_of()
    for one in (chain, rounded):
        freeze(one, ["embed.block.visual", "visual_[0-9]*"], "freeze")
        freeze_idle(one, [state.layout])
    kept = store_frozen(chain, halved.stacks)
    vectors = sum(p.numel() for name, p in chain.named_parameters() if name.startswith("visual_0") and p.dim() == 1)
    whole = sum(p.numel() for name, p in chain.named_parameters() if name.startswith("visual_0"))
    assert kept == {"visual": whole - vectors}
    assert store_frozen(rounded, WRITER.stacks) == {}
    for own, other in zip(chain.parameters(), rounded.parameters(), strict=True):
        other.data.copy_(own)
        assert own.dtype == torch.float32 or not own.requires_grad
    losses = [one(state)["loss"] for one in (chain, rounded)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for own, other in zip(chain.parameters(), rounded.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)
