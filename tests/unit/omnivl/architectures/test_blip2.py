"""BLIP-2: parity with transformers' class through files on disk, masks, sizes, what it refuses, what it trains."""

from dataclasses import replace

import pytest
import torch
from small_blip2 import SMALL, STAGE_1, make_batch, peer
from small_towers import SIZES, TOKENS, scattered
from transformers import (
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
)

from moe.config import MoMEConfig
from omnivl.architectures import BLIP2
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import text_layout
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.positions import prepared_targets
from omnivl.chain.state import State
from omnivl.errors import ModelError
from omnivl.inference.generate import caption_search, generate
from omnivl.inference.predict import predict
from omnivl.objectives import LM, MDM, MLM, MRM, VLM
from omnivl.parts import attention
from omnivl.parts.losses import Losses
from omnivl.parts.similarity import similarity
from omnivl.parts.sizes import MomentumConfig, Words
from omnivl.pretrained.load import load_pretrained

MATCHING = (VLM(),)
NEAR = {"rtol": 2e-5, "atol": 2e-5}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def inputs():
    frames = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    token_ids = torch.where(MASK == 1, torch.randint(5, 50, (2, 7)), TOKENS.pad)
    pixels = (frames[:, 0].float() / 255 - MEAN) / STD
    return frames, token_ids, {"input_ids": token_ids, "attention_mask": MASK, "pixel_values": pixels}


def loaded(folder, objectives=MATCHING):
    torch.manual_seed(0)
    theirs = scattered(peer())
    theirs.save_pretrained(folder)
    chain = build_chain(SMALL, objectives, TOKENS)
    return theirs, chain, load_pretrained(chain, SMALL, folder)


def check_gradients(chain, theirs, folder):
    """All that have a gradient, theirs by our names.

    Theirs of the patches is by pixels of another normalisation. Theirs is zero where ours is left out.
    """
    pixels = ("embed.block.visual.patches.weight", "embed.block.visual.patches.bias")
    wanted = SMALL.from_foreign({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, folder)
    own = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    assert own.keys() == {name for name, gradient in wanted.items() if gradient.any()}
    for name in own.keys() - set(pixels):
        torch.testing.assert_close(own[name], wanted[name], rtol=2e-4, atol=3e-5, msg=name)


def test_contrast_equals_transformers(tmp_path):
    theirs, chain, report = loaded(tmp_path, ())
    assert report.unexpected == ("losses.heads.vlm.output.bias", "losses.heads.vlm.output.weight")
    assert report.missing == ("contrast.logit_scale",)
    frames, token_ids, given = inputs()
    wanted = theirs(**given)
    visual, text = chain.encode_visual(frames), chain.encode_text(token_ids)
    assert visual.shape == (2, 4, 8)
    torch.testing.assert_close(visual, wanted.image_embeds, **NEAR)
    torch.testing.assert_close(text, wanted.text_embeds, **NEAR)
    own = similarity(visual, text)
    torch.testing.assert_close(own, wanted.logits_per_image, **NEAR)
    direction = torch.randn(2, 2)
    (own * direction).sum().backward()
    (wanted.logits_per_image * direction).sum().backward()
    check_gradients(chain, theirs, tmp_path)


def test_matching_equals_transformers(tmp_path):
    theirs, chain, report = loaded(tmp_path)
    assert report.unexpected == ()
    frames, token_ids, given = inputs()
    wanted = theirs(**given, use_image_text_matching_head=True).logits_per_image
    own = predict(chain, "vlm", frames, token_ids)
    torch.testing.assert_close(own, wanted[:, 1] - wanted[:, 0], **NEAR)
    direction = torch.randn(2)
    (own * direction).sum().backward()
    ((wanted[:, 1] - wanted[:, 0]) * direction).sum().backward()
    check_gradients(chain, theirs, tmp_path)


def before_losses(chain, frames, token_ids, demands):
    """The state that losses would read."""
    layout = lay_out({"all": demands}, "image_text", len(frames), 1, "predict")
    state = State({"frames": frames, "token_ids": token_ids, "all/token_ids": token_ids}, layout)
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


WRITTEN = Demands(joins={"all": Join(text="all", mask="causal")})


def test_written_words_equal_one_pass_under_the_causal_mask_of_the_paper(tmp_path):
    """Figure 2: queries see queries; words see queries and the words before them."""
    theirs, chain, _ = loaded(tmp_path)
    frames, token_ids, given = inputs()
    own = before_losses(chain, frames, token_ids, WRITTEN).rows("generation", "all")
    features = theirs.vision_model(given["pixel_values"])[0]
    together = theirs.embeddings(input_ids=token_ids, query_embeds=theirs.query_tokens.expand(2, -1, -1))
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[:4, :4] = True
    wanted = theirs.qformer(
        query_embeds=together,
        query_length=4,
        attention_mask=mask.expand(2, 1, 11, 11),
        encoder_hidden_states=features,
    ).last_hidden_state[:, 4:]
    torch.testing.assert_close(own, wanted, **NEAR)
    direction = torch.randn_like(wanted) * MASK[..., None]  # theirs has no gradient of the padding token
    (own * direction).sum().backward()
    (wanted * direction).sum().backward()
    check_gradients(chain, theirs, tmp_path)


def test_a_later_word_changes_no_earlier_one_and_no_query():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (), TOKENS))
    frames, token_ids, _ = inputs()
    other = token_ids.clone()
    other[:, 3] = 7
    demands = replace(WRITTEN, reads=frozenset({"queries"}))
    one, two = (before_losses(chain, frames, ids, demands) for ids in (token_ids, other))
    torch.testing.assert_close(one["generation"][:, :3], two["generation"][:, :3])
    assert not torch.isclose(one["generation"][:, 3:], two["generation"][:, 3:]).all(-1).any()
    assert torch.equal(one["queries"], two["queries"])
    alone = before_losses(chain, frames, token_ids, Demands(reads=frozenset({"queries"})))
    torch.testing.assert_close(one["queries"], alone["queries"])


def test_words_of_joined_rows_see_words_and_queries_but_the_padding():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (), TOKENS))
    frames, token_ids, _ = inputs()
    joined = Demands(joins={"all": Join()}, reads=frozenset({"pooled", "fused_visual"}))
    state = before_losses(chain, frames, token_ids, joined)
    assert state["fused"].shape == (2, 7, 16)
    assert torch.equal(state["fused_mask"], MASK.bool())
    first = before_losses(chain, frames[:1], token_ids[:1, :4], joined)
    torch.testing.assert_close(first.pooled("all"), state.pooled("all")[:1])
    torch.testing.assert_close(first["fused"], state["fused"][:1, :4])
    later = token_ids.clone()
    later[:, 3] = 7
    assert not torch.isclose(before_losses(chain, frames, later, joined)["fused"], state["fused"]).all(-1).any()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_published_configuration_has_the_published_size():
    model = replace(BLIP2(), words=Words(length=512, vocab_size=30523))  # all positions of BERT's table
    with torch.device("meta"):
        chain = build_chain(model, STAGE_1, TOKENS)
        bare = Blip2QFormerModel(Blip2QFormerConfig(use_qformer_text_input=True))
        tower = Blip2VisionModel(Blip2VisionConfig())
    blocks, visual = (
        sum(parameters(layer) for name, layer in chain.named_layers.items() if name.startswith(stack))
        for stack in ("qformer_", "visual_")
    )
    # ViT-g without its last block, and the norm behind it: 985.95 M.
    assert visual + parameters(chain.embed.block.visual) == parameters(tower) == 985_952_256
    assert blocks + parameters(chain.embed.block.text.norm) == parameters(bare) == 161_825_280
    # With the words' embeddings and the head on words, whose last map is tied to these in the released code: 186.28 M.
    head = parameters(chain.losses.vocabulary) - 30523 * 768
    assert blocks + parameters(chain.embed.block.text) + head == 186_282_811
    # With 32 queries, two projections and the matching head 186.70 M; the paper's 188 M are rounded up from there.
    others = 32 * 768 + parameters(chain.contrast) - 1 + parameters(chain.losses.heads)
    assert others == 32 * 768 + 2 * (768 * 256 + 256) + 768 * 2 + 2


def step(objectives, frames=1, batch=None):
    batch = make_batch(objectives, frames=frames) if batch is None else batch
    return State.from_batch(batch, plan_layout(objectives, batch.kind, 4, frames))


CASES = {
    "stage 1": STAGE_1,
    "itc": STAGE_1[:1],
    "vlm": STAGE_1[1:2],
    "lm": STAGE_1[2:],
    "itc and lm": (STAGE_1[0], STAGE_1[2]),
    "mlm": (MLM(probability=0.5),),
    "mlm of texts alone": (MLM(probability=0.5, grounded=False),),
    "mlm and vlm": (MLM(probability=0.5), VLM()),
    "two that write": (LM(), LM(name="again")),
}


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_idle_parameters_are_those_without_a_gradient(case, layers):
    torch.manual_seed(0)
    objectives = CASES[case]
    chain = build_chain(replace(SMALL, qformer=replace(SMALL.qformer, layers=layers)), objectives, TOKENS)
    state = step(objectives)
    out = chain(state)
    assert out.named("loss").keys() == {objective.key for objective in objectives}
    out["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([state.layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recompute", ["block", "ffn", "attention"])
def test_recomputation_changes_nothing(case, recompute):
    results = []
    for mode in ("none", recompute):
        torch.manual_seed(0)
        chain = build_chain(SMALL.recomputing(mode), CASES[case], TOKENS)
        loss = chain(step(CASES[case]))["loss"]
        loss.backward()
        gradients = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, msg=name)


def test_losses_fall():
    torch.manual_seed(0)
    chain = build_chain(SMALL, STAGE_1, TOKENS)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    state, losses = step(STAGE_1), []
    for _ in range(100):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append({name: loss.item() for name, loss in out.named("loss").items()})
    assert losses[-1]["itc"] < 0.7 * losses[0]["itc"]
    assert losses[-1]["vlm"] < 0.5 * losses[0]["vlm"]
    assert losses[-1]["lm"] < 0.5 * losses[0]["lm"]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("case", ["stage 1", "vlm", "lm", "mlm and vlm"])
def test_operations_are_what_torch_counts(monkeypatch, case, frames):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    objectives = CASES[case]
    chain = build_chain(replace(SMALL, projection_size=1), objectives, TOKENS)
    batch = make_batch(objectives, frames=frames)
    state = step(objectives, frames, batch)
    targets = torch.full((4, 7), -100)
    targets[:, 1] = 5  # one of seven positions of each text, which are chosen in whole quarters of the rows
    for key in ("mlm", "lm"):
        if f"{key}/targets" in state:
            state = state.merged(prepared_targets(key, targets))
    with FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    monkeypatch.setattr(MLM, "restored_words", property(lambda self: {self.key: 1 / 7}))
    head = 3 * 12 * 2 * 16 * 2 if VLM in map(type, objectives) else 0  # the two scores, which are not counted
    unwritten = 6 / 7 * chain.losses.flops(state.layout, None) if "lm" in state.layout.generation else 0
    reached = counter.get_total_flops() - head + unwritten
    # Projections and similarities of one number each are counted there alone.
    assert reached == pytest.approx(chain_flops(chain, state.layout), rel=5e-3)


def test_cached_writing_equals_writing_without_a_cache():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (LM(),), TOKENS)).eval()
    frames = make_batch().frames
    for beams in (1, 3):
        options = caption_search(TOKENS, 6, beams)
        with_cache, without = (generate(chain, "lm", frames, options, cached=cached) for cached in (True, False))
        assert torch.equal(with_cache.token_ids, without.token_ids)
        torch.testing.assert_close(with_cache.log_probability, without.log_probability)
    alone = generate(chain, "lm", frames[:1], caption_search(TOKENS, 6, 3))
    assert torch.equal(alone.token_ids, with_cache.token_ids[:1])


def test_each_text_is_matched_with_the_image_that_it_is_given():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (VLM(),), TOKENS)).eval()
    frames, token_ids, _ = inputs()
    pairs = predict(chain, "vlm", frames, token_ids)
    crossed = predict(chain, "vlm", frames, token_ids.repeat(2, 1), torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(crossed[:2], pairs)
    assert not torch.allclose(crossed[2:], pairs)


def test_dropout_takes_from_embeddings_and_blocks_in_training_alone():
    torch.manual_seed(0)
    chain = build_chain(replace(SMALL, qformer=replace(SMALL.qformer, dropout=0.5)), (VLM(),), TOKENS)
    frames, token_ids, _ = inputs()
    draws = [predict(chain, "vlm", frames, token_ids) for _ in range(2)]
    assert not torch.allclose(*draws)
    chain.eval()
    assert torch.equal(*(predict(chain, "vlm", frames, token_ids) for _ in range(2)))


def test_queries_look_at_all_frames_of_a_clip():
    torch.manual_seed(0)
    chain = scattered(build_chain(replace(SMALL, num_frames=3), (), TOKENS)).eval()
    clips = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    whole = chain.encode_visual(clips)
    assert whole.shape == (2, 4, 8)
    other = clips.clone()
    other[:, 2] = 0
    assert not torch.isclose(chain.encode_visual(other), whole).all(-1).any()
    # Frames are told apart by nothing but what they show.
    torch.testing.assert_close(chain.encode_visual(clips.flip(1)), whole)


def test_the_qformer_starts_from_bert(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "vocab_size": 49, "max_position_embeddings": 9}
    bert = scattered(BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)))
    bert.save_pretrained(tmp_path)
    chain = build_chain(SMALL, (), TOKENS)
    report = load_pretrained(chain, SMALL, tmp_path)
    assert report.resized == {"embed.block.text.positions": "[9, 16] -> [7, 16]"}
    assert report.unexpected == ()  # of BERT's pooler nothing is made
    assert not [name for name in report.missing if "ffn" in name and name.startswith("qformer_")]
    _, token_ids, given = inputs()
    token_ids = token_ids.clamp(max=48)
    state = State({"token_ids": token_ids}, text_layout(2))
    for layer in chain.program:
        if layer is chain.contrast:
            break
        state = layer(state)
    wanted = bert(input_ids=token_ids, attention_mask=given["attention_mask"]).last_hidden_state
    torch.testing.assert_close(state["text"], wanted, **NEAR)
    for name, parameter in chain.qformer_01.block.ffn.named_parameters():
        assert torch.equal(parameter, chain.qformer_01.block.ffn_query.get_parameter(name))


def test_a_tower_and_bert_are_named_apart(tmp_path):
    peer().save_pretrained(tmp_path / "blip2")
    sizes = {**SIZES, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 7}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    chain = build_chain(SMALL, (), TOKENS)
    vision = load_pretrained(chain, SMALL, tmp_path / "blip2", part="vision")
    text = load_pretrained(chain, SMALL, tmp_path / "bert", part="text")
    assert {name.split("_")[0] for name in vision.matched} == {
        "embed.block.visual.class",
        "embed.block.visual.positions",
        "embed.block.visual.patches.weight",
        "embed.block.visual.patches.bias",
        "visual",
        "contrast.visual",
    }
    assert {name.split("_")[0] for name in text.matched} == {
        "embed.block.text.words",
        "embed.block.text.positions",
        "embed.block.text.norm.weight",
        "embed.block.text.norm.bias",
        "qformer",
    }
    # What BERT lacks keeps its start: cross-attention, and the projection of texts.
    assert {name.split(".")[2] for name in text.missing if name.startswith("qformer")} == {"cross", "norm2"}


def test_weights_that_would_be_computed_otherwise_are_refused(tmp_path):
    peer().save_pretrained(tmp_path)
    model = replace(SMALL, cross_every=1, vision=replace(SMALL.vision, num_heads=4))
    with pytest.raises(ModelError) as caught:
        load_pretrained(build_chain(model, (), TOKENS), model, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: model.cross_every: got 1; allowed 2 with these weights; set it, or give other weights\n"
        f"{tmp_path}: model.vision.num_heads: got 4; allowed 2 with these weights; set it, or give other weights"
    )


@pytest.mark.parametrize(
    ("objective", "stream"),
    [(MRM(), "masked_visual"), (MDM(), "fused_visual")],
    ids=lambda value: getattr(value, "key", value),
)
def test_objectives_on_streams_that_it_lacks_are_refused(objective, stream):
    with pytest.raises(ModelError) as caught:
        build_chain(SMALL, (objective,), TOKENS)
    assert str(caught.value).startswith(
        f"objective {objective.key!r} asks for the stream {stream!r}; architecture 'blip2' has visual, queries, text, "
    )


def test_written_texts_see_their_own_queries_alone():
    chain = build_chain(SMALL, (), TOKENS)
    frames, token_ids, _ = inputs()
    looking = Demands(joins={"all": Join(text="all", sees="other", mask="causal")}, rows={"visual": {"clean": 2}})
    with pytest.raises(ModelError) as caught:
        before_losses(chain, frames, token_ids, looking)
    assert str(caught.value) == (
        "written text 'all': got a look at 'other'; allowed is 'clean' where texts see queries; take the objective out "
        "or change model.kind"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(SMALL, image_size=20), "model.image_size: got 20; allowed a multiple of patch_size 8; change either"),
        (
            replace(SMALL, qformer=replace(SMALL.qformer, num_heads=3)),
            "model.qformer.hidden_size: got 16; allowed a multiple of num_heads 3; change either",
        ),
        (
            replace(SMALL, qformer=replace(SMALL.qformer, norm="pre")),
            "model.qformer.norm: got 'pre'; allowed 'post' there; set it to 'post'",
        ),
        (
            replace(SMALL, vision=replace(SMALL.vision, norm="post")),
            "model.vision.norm: got 'post'; allowed 'pre' there; set it to 'pre'",
        ),
        (
            replace(SMALL, qformer=replace(SMALL.qformer, layers=0)),
            "model.qformer.layers: got 0; allowed 1 or more; raise it, e.g. to 12",
        ),
        (
            replace(SMALL, vision=replace(SMALL.vision, mlp_ratio=0.01)),
            "model.vision.mlp_ratio: got 0.01; allowed 1 / hidden_size or more; raise it, e.g. to 4",
        ),
        (
            replace(SMALL, qformer=replace(SMALL.qformer, ffn=MoMEConfig())),
            "model.qformer.ffn.kind: got 'mome'; allowed 'dense' in 'blip2'; set it to 'dense', or change model.kind",
        ),
        (
            replace(SMALL, qformer=replace(SMALL.qformer, drop_path=0.1)),
            "model.qformer.drop_path: got 0.1; allowed 0.0 there; set it to 0.0",
        ),
        (
            replace(SMALL, words=Words(length=2, vocab_size=50)),
            "model.words.length: got 2; allowed 3 or more: [CLS] word [SEP]; raise it",
        ),
        (
            replace(SMALL, words=Words(length=7, vocab_size=50, norm_embeddings=False)),
            "model.words.norm_embeddings: got false; allowed true in 'blip2'; set it to true",
        ),
        (
            replace(SMALL, momentum=MomentumConfig()),
            "model.momentum: got momentum twins; allowed null in 'blip2', which has none; set it to null",
        ),
        (
            replace(SMALL, words=Words(length=7, vocab_size=40)),
            "model.words.vocab_size: 40 rows for a tokenizer of 50 words; set it to 50 or more",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(model, message):
    with pytest.raises(ModelError) as caught:
        build_chain(model, (), TOKENS)
    assert str(caught.value) == message
