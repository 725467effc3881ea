"""ViLT: parity with transformers' classes through files on disk, sizes, what it refuses, what it trains."""

from dataclasses import replace

import pytest
import torch
from small_towers import SIZES, TOKENS, scattered
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
    ViTConfig,
    ViTModel,
)

from moe.config import LIMoEConfig, MoMEConfig
from omnivl.architectures import ViLT
from omnivl.architectures.build import build_chain
from omnivl.architectures.vilt import TELLING
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.positions import prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import ModelError
from omnivl.inference.predict import predict
from omnivl.objectives import ITM, LM, MDM, MLM, MRM, VLM, Objective, PrepareContext, UniVLC
from omnivl.parts import attention
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import MomentumConfig, Transformer, Words
from omnivl.parts.streams import Part, Stream
from omnivl.pretrained.load import load_pretrained

NEAR = {"rtol": 2e-5, "atol": 2e-5}
SMALL = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-12),
    words=Words(length=7, vocab_size=50),
    image_size=16,
    patch_size=8,
)
OBJECTIVES: tuple[Objective, ...] = (MLM(probability=0.5), ITM())
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def peer_of(cls, **more):
    return scattered(
        cls(ViltConfig(**SIZES, vocab_size=50, max_position_embeddings=7, image_size=16, patch_size=8, **more))
    )


def inputs_of(side=16):
    frames = torch.randint(0, 256, (2, 1, 3, side, side), dtype=torch.uint8)
    token_ids = torch.where(MASK == 1, torch.randint(5, 50, (2, 7)), TOKENS.pad)
    theirs = {"input_ids": token_ids, "attention_mask": MASK, "pixel_values": frames[:, 0].float() / 127.5 - 1.0}
    return frames, token_ids, theirs


def loaded(peer, folder, objectives=()):
    peer.save_pretrained(folder)
    chain = build_chain(SMALL, objectives, TOKENS)
    return chain, load_pretrained(chain, SMALL, folder)


def before_losses(chain, frames, token_ids):
    """The state that losses would read of pairs whose every position is read."""
    reads = frozenset({"pooled", "fused_visual"})
    layout = lay_out({"all": Demands(joins={"all": Join()}, reads=reads)}, "image_text", 2, 1, "predict")
    state = State({"frames": frames, "token_ids": token_ids}, layout)
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


def check_gradients(chain, peer, path, tied=()):
    wanted = SMALL.from_foreign({name: p.grad for name, p in peer.named_parameters() if p.grad is not None}, path)
    own = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    for one, other in tied:
        own[one] = own[one] + own.pop(other)
    compared = own.keys() & wanted.keys()
    assert compared == own.keys()
    for name in compared:
        torch.testing.assert_close(own[name], wanted[name], rtol=2e-4, atol=3e-5, msg=name)
    return len(compared)


@pytest.fixture(autouse=True)
def patches_in_their_order(monkeypatch):
    """Transformers' class draws the order of an image's patches."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, count: torch.arange(int(count)))


@pytest.mark.parametrize("side", [16, 32])
def test_hidden_states_and_pooled_equal_transformers(tmp_path, side):
    torch.manual_seed(0)
    peer = peer_of(ViltModel)
    chain, report = loaded(peer, tmp_path)
    assert (report.missing, report.unexpected, report.resized) == ((), (), {})
    frames, token_ids, theirs = inputs_of(side)
    state, wanted = before_losses(chain, frames, token_ids), peer(**theirs)
    hidden = torch.cat([state.rows("fused", "all"), state.rows("fused_visual", "all")], dim=1)
    assert hidden.shape == (2, 7 + 1 + (side // 8) ** 2, 16)
    real = torch.cat([token_ids != TOKENS.pad, torch.ones(2, 1 + (side // 8) ** 2, dtype=torch.bool)], dim=1)
    assert not real.all()
    torch.testing.assert_close(hidden[real], wanted.last_hidden_state[real], **NEAR)  # padding is not computed
    torch.testing.assert_close(state.pooled("all"), wanted.pooler_output, **NEAR)
    direction, other = torch.randn_like(hidden) * real[..., None], torch.randn(2, 16)
    ((hidden * direction).sum() + (state.pooled("all") * other).sum()).backward()
    ((wanted.last_hidden_state * direction).sum() + (wanted.pooler_output * other).sum()).backward()
    assert check_gradients(chain, peer, tmp_path) == len(list(chain.parameters()))


def test_the_masked_words_loss_equals_transformers(tmp_path):
    torch.manual_seed(0)
    peer = peer_of(ViltForMaskedLM)
    chain, report = loaded(peer, tmp_path, (MLM(),))
    assert report.unexpected == ()
    frames, token_ids, theirs = inputs_of()
    targets = torch.full_like(token_ids, -100)
    targets[0, 2], targets[1, 1], targets[1, 4] = 7, 30, 8
    given = {"frames": frames, "mlm/token_ids": token_ids, "mlm/targets": targets}
    own = chain(State(given, plan_layout((MLM(),), "image_text", 2, 1)))["loss"]
    wanted = peer(**theirs, labels=targets).loss
    torch.testing.assert_close(own, wanted, **NEAR)
    own.backward()
    wanted.backward()
    # Theirs has one table for the words that it reads and those that it restores, and passes no pooler.
    tied = [("embed.block.text.words", "losses.vocabulary.decoder.weight")]
    assert check_gradients(chain, peer, tmp_path, tied) == len(list(chain.parameters())) - 3
    assert chain.fused_norm.block.pooler.weight.grad is None


def test_words_that_the_weights_lack_keep_what_they_have_in_the_head_as_well(tmp_path):
    torch.manual_seed(0)
    peer = peer_of(ViltForMaskedLM)
    peer.save_pretrained(tmp_path)
    tokens, model = replace(TOKENS, vocab_size=53), replace(SMALL, words=Words(length=7, vocab_size=53))
    chain = build_chain(model, (MLM(),), tokens)
    fresh = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    report = load_pretrained(chain, model, tmp_path)
    head = chain.losses.vocabulary.decoder
    assert torch.equal(head.weight[:50], peer.vilt.embeddings.text_embeddings.word_embeddings.weight)
    assert torch.equal(head.weight[50:], fresh["losses.vocabulary.decoder.weight"][50:])
    assert torch.equal(head.bias[50:], fresh["losses.vocabulary.decoder.bias"][50:])
    assert (report.missing, report.unexpected) == ((), ())


@pytest.mark.parametrize(
    ("cls", "head"), [(ViltForQuestionAnswering, "classifier"), (ViltForImageAndTextRetrieval, "rank_output")]
)
def test_heads_of_tasks_read_what_they_would_there(tmp_path, cls, head):
    torch.manual_seed(0)
    peer = peer_of(cls, num_labels=5)
    chain, report = loaded(peer, tmp_path)
    assert report.missing == ()
    assert all(name.startswith(head) for name in report.unexpected)
    frames, token_ids, theirs = inputs_of()
    own = getattr(peer, head)(before_losses(chain, frames, token_ids).pooled("all"))
    torch.testing.assert_close(own, peer(**theirs).logits, **NEAR)


def test_weights_of_other_sizes_are_brought_to_ours(tmp_path):
    torch.manual_seed(0)
    peer = peer_of(ViltModel)
    peer.save_pretrained(tmp_path)
    model = replace(SMALL, image_size=32, words=Words(length=9, vocab_size=53))
    chain = build_chain(model, (), TOKENS)
    fresh = {name: p.detach().clone() for name, p in chain.named_parameters()}
    report = load_pretrained(chain, model, tmp_path)
    assert report.resized == {
        "embed.block.visual.positions": "[5, 16] -> [17, 16]",
        "embed.block.text.positions": "[7, 16] -> [9, 16]",
    }
    words, places = chain.embed.block.text.words, chain.embed.block.text.positions
    theirs = peer.embeddings.text_embeddings
    assert torch.equal(words[:50], theirs.word_embeddings.weight)
    assert torch.equal(words[50:], fresh["embed.block.text.words"][50:])
    assert torch.equal(places[7:], fresh["embed.block.text.positions"][7:])
    # A table of the other grid, or interpolated in each step: the same positions.
    frames, token_ids, inputs = inputs_of(32)
    own = before_losses(chain, frames, token_ids).pooled("all")
    torch.testing.assert_close(own, peer(**inputs).pooler_output, **NEAR)


def test_blocks_and_patches_start_from_vit(tmp_path):
    torch.manual_seed(0)
    peer = scattered(ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False))
    chain, report = loaded(peer, tmp_path)
    assert report.unexpected == ()
    own = {"embed.block.modalities", "fused_norm.block.pooler.weight", "fused_norm.block.pooler.bias"}
    assert {name for name in report.missing if not name.startswith("embed.block.text.")} == own
    assert torch.equal(chain.embed.block.visual.positions, peer.embeddings.position_embeddings[0])
    # The normalised class token of an image alone: rows without a text.
    x = chain.embed.block.visual(frames := inputs_of()[0], torch.float32)
    for layer in (chain.fused_00, chain.fused_01):
        x = layer.block(Stream(x, (Part("image", 5),)))[0][0]
    wanted = peer(frames[:, 0].float() / 127.5 - 1.0).last_hidden_state
    torch.testing.assert_close(chain.fused_norm.block.norm(x), wanted, **NEAR)


def test_weights_of_other_classes_are_not_taken_for_its_own(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="got weights that architecture 'vilt' does not know, first names: "):
        load_pretrained(build_chain(SMALL, (), TOKENS), SMALL, tmp_path)
    weights = {name: torch.zeros(1) for name in TELLING}
    assert SMALL.from_foreign(weights, tmp_path) is None, "by the folder's configuration, which is CLIP's"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"num_heads": 4},
            "model.blocks.num_heads: got 4; allowed 2 with these weights; set it, or give other weights",
        ),
        ({}, "model.blocks.activation: got 'gelu'; allowed 'relu' with these weights; set it, or give other weights"),
    ],
)
def test_weights_that_would_be_computed_otherwise_are_refused(tmp_path, blocks, message):
    peer_of(ViltModel, hidden_act="gelu" if blocks else "relu").save_pretrained(tmp_path)
    model = replace(SMALL, blocks=replace(SMALL.blocks, **blocks))
    with pytest.raises(ModelError) as caught:
        load_pretrained(build_chain(model, (), TOKENS), model, tmp_path)
    assert str(caught.value) == f"{tmp_path}: {message}"


def test_the_published_configuration_has_the_published_size():
    with torch.device("meta"):
        chain, peer = build_chain(ViLT(), (), TOKENS), ViltModel(ViltConfig())
    own, theirs = (sum(parameter.numel() for parameter in model.parameters()) for model in (chain, peer))
    assert own == theirs == 111_595_008


def make_batch(objectives, size=4):
    draw = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (size, 1, 3, 16, 16), generator=draw, dtype=torch.uint8)
    token_ids = torch.randint(5, 50, (size, 7), generator=draw)
    token_ids[:, 0], token_ids[:, 4], token_ids[:, 5:] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    own = torch.arange(size)
    batch = Batch("image_text", frames, token_ids, own, own, own)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


FILLINGS = {
    "dense": SMALL.blocks.ffn,
    "mome": MoMEConfig(fusion_from=1),
    "limoe": LIMoEConfig(num_experts=4, every=1, implementation="loop"),
}


@pytest.mark.parametrize("ffn", FILLINGS)
@pytest.mark.parametrize("objectives", [OBJECTIVES, (MLM(),), (ITM(),), (ITM(alignment_weight=0.0),)])
def test_idle_parameters_are_those_without_a_gradient(objectives, ffn):
    torch.manual_seed(0)
    chain = build_chain(replace(SMALL, blocks=replace(SMALL.blocks, ffn=FILLINGS[ffn])), objectives, TOKENS)
    layout = plan_layout(objectives, "image_text", 4, 1)
    out = chain(State.from_batch(make_batch(objectives), layout))
    assert out.named("loss").keys() >= {objective.key for objective in objectives}
    out["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_losses_fall():
    torch.manual_seed(0)
    chain = build_chain(SMALL, OBJECTIVES, TOKENS)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    state = State.from_batch(make_batch(OBJECTIVES), plan_layout(OBJECTIVES, "image_text", 4, 1))
    losses = []
    for _ in range(60):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append({name: loss.item() for name, loss in out.named("loss").items()})
    assert losses[-1]["mlm"] < 0.3 * losses[0]["mlm"]
    assert losses[-1]["itm"] < 0.3 * losses[0]["itm"]


@pytest.mark.parametrize("objectives", [OBJECTIVES, (MLM(),)])
def test_operations_are_what_torch_counts(monkeypatch, objectives):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    objectives = tuple(replace(one, alignment_weight=0.0) if isinstance(one, ITM) else one for one in objectives)
    chain = build_chain(SMALL, objectives, TOKENS)
    layout = plan_layout(objectives, "image_text", 4, 1)
    batch = make_batch(objectives)
    batch = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == TOKENS.pad, 9))
    targets = torch.full((4, 7), -100)
    targets[:, 1] = 5  # one of seven positions of each text, which are chosen in whole quarters of the rows
    state = State.from_batch(batch, layout).merged(prepared_targets("mlm", targets))
    hidden = state["mlm/token_ids"]
    state = state.merged({"mlm/token_ids": hidden.masked_fill(hidden == TOKENS.pad, 9)})
    with FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    monkeypatch.setattr(MLM, "restored_words", property(lambda self: {self.key: 1 / 7}))
    head = 3 * 4 * 2 * 16 * 2 if ITM in map(type, objectives) else 0  # the two scores, which are not counted
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout) + head, rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "stream"),
    [
        (UniVLC(), "embedding"),
        (VLM(), "embedding"),
        (MRM(), "masked_visual"),
        (MLM(grounded=False), "text"),
        (MDM(), "masked_visual"),
        (LM(), "generation"),
    ],
    ids=lambda value: getattr(value, "key", value),
)
def test_objectives_on_streams_that_it_lacks_are_refused(objective, stream):
    with pytest.raises(ModelError) as caught:
        build_chain(SMALL, (objective,), TOKENS)
    assert str(caught.value) == (
        f"objective {objective.key!r} asks for the stream {stream!r}; architecture 'vilt' has fused, fused_visual; "
        "take the objective out or change model.kind"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(SMALL, image_size=20), "model.image_size: got 20; allowed a multiple of patch_size 8; change either"),
        (
            replace(SMALL, blocks=replace(SMALL.blocks, num_heads=3)),
            "model.blocks.hidden_size: got 16; allowed a multiple of num_heads 3; change either",
        ),
        (
            replace(SMALL, blocks=replace(SMALL.blocks, norm="post")),
            "model.blocks.norm: got 'post'; allowed 'pre' in 'vilt'; set it to 'pre'",
        ),
        (
            replace(SMALL, blocks=replace(SMALL.blocks, layers=0)),
            "model.blocks.layers: got 0; allowed 1 or more; raise it, e.g. to 12",
        ),
        (
            replace(SMALL, blocks=replace(SMALL.blocks, mlp_ratio=0.01)),
            "model.blocks.mlp_ratio: got 0.01; allowed 1 / hidden_size or more; raise it, e.g. to 4",
        ),
        (
            replace(SMALL, words=Words(length=2, vocab_size=50)),
            "model.words.length: got 2; allowed 3 or more: [CLS] word [SEP]; raise it",
        ),
        (
            replace(SMALL, momentum=MomentumConfig()),
            "model.momentum: got momentum twins; allowed null in 'vilt', which has none; set it to null",
        ),
        (
            replace(SMALL, blocks=replace(SMALL.blocks, ffn=LIMoEConfig(blocks=(5,)))),
            "model.blocks.ffn.blocks: got 5; allowed -2 to 1, the blocks of 2 layers; name another block or build more",
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


def test_clips_and_masked_images_are_refused():
    chain = build_chain(SMALL, (ITM(),), TOKENS)
    with pytest.raises(ModelError, match=r"got samples of 3 frames or pictures; allowed is one image; change the kind"):
        predict(chain, "itm", torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), torch.ones(2, 7, dtype=torch.int64))
    rows = {"visual": {"own": 2}}
    layout = lay_out({"own": Demands(rows=rows, joins={"own": Join(sees="own")})}, "image_text", 2, 1, "train")
    with pytest.raises(ModelError, match=r"got the masked images 'own'; allowed are whole ones; take the objective"):
        chain(State({"frames": torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8)}, layout))


def test_dropout_takes_from_embeddings_and_blocks_in_training_alone():
    torch.manual_seed(0)
    chain = build_chain(replace(SMALL, blocks=replace(SMALL.blocks, dropout=0.5)), (), TOKENS)
    frames, token_ids, _ = inputs_of()
    draws = [before_losses(chain, frames, token_ids).pooled("all") for _ in range(2)]
    assert not torch.allclose(*draws)
    chain.eval()
    still = [before_losses(chain, frames, token_ids).pooled("all") for _ in range(2)]
    assert torch.equal(*still)


def test_each_text_is_matched_with_the_image_that_it_is_given():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, (ITM(),), TOKENS)).eval()
    frames, token_ids, _ = inputs_of()
    pairs = predict(chain, "itm", frames, token_ids)
    crossed = predict(chain, "itm", frames, token_ids.repeat(2, 1), torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(crossed[:2], pairs)
    assert not torch.allclose(crossed[2:], pairs)
