"""The whole chain: gradients everywhere, padding, recomputation, inference, momentum."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_chain import CONFIG, EVERYTHING, TOKENS, make_batch

from moe.config import LIMoEConfig
from moe.routers import ExpertChoice, NoisyRouterLossConfig, TokenChoice
from moe.routers.sums import RouterSums
from omnivl.architectures import Unified
from omnivl.architectures.build import build_chain, outline
from omnivl.chain.layout import plan_layout
from omnivl.chain.names import stack_of
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DATA_KINDS
from omnivl.errors import ModelError
from omnivl.inference.predict import predict
from omnivl.objectives import LM, MLM, VLM, UniVLC
from omnivl.parts.sizes import MomentumConfig

PAIRED = DATA_KINDS[:4]  # something to see, with a text


def run(chain, batch, objectives=EVERYTHING):
    return chain(State.from_batch(batch, plan_layout(objectives, batch.kind, batch.size, batch.num_frames)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_in_some_kind(dtype):
    torch.manual_seed(0)
    chain = build_chain(CONFIG, EVERYTHING, TOKENS, compute_dtype=dtype)
    for kind in PAIRED:
        run(chain, make_batch(kind))["loss"].backward()
    without = [name for name, p in chain.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    for name, parameter in chain.named_parameters():
        assert parameter.dtype == torch.float32
        if "momentum_" in name:
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert bool(parameter.grad.isfinite().all()), name


def test_padding_changes_no_embedding():
    torch.manual_seed(0)
    chain = build_chain(replace(CONFIG, text_length=12), (), TOKENS)
    token_ids = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]])
    longer = torch.cat([token_ids, torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(chain.encode_text(longer), chain.encode_text(token_ids))


@pytest.mark.parametrize("architecture", ["omnivl", "unified"])
@pytest.mark.parametrize("text_layers", [0, 2])
def test_the_mean_of_patches_and_of_words_is_projected(architecture, text_layers):
    """No block computes its first position alone, and padding is left out of the mean."""
    torch.manual_seed(0)
    pooled = {"visual_pooling": "mean", "text_pooling": "mean"}
    towers = replace(CONFIG, text_layers=text_layers, **pooled)
    config = towers if architecture == "omnivl" else replace(Unified.like(CONFIG), **pooled)
    chain = build_chain(config, (), TOKENS).eval()
    seen = {}
    chain.contrast.register_forward_pre_hook(lambda layer, args: seen.update(args[0]))
    frames = torch.randint(256, (2, config.num_frames, 3, config.video_size, config.video_size), dtype=torch.uint8)
    found = chain.encode_visual(frames)
    assert seen["visual"].shape[1] > 2
    torch.testing.assert_close(found, wanted_of(chain.contrast.visual_projection, seen["visual"][:, 1:]))
    token_ids = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]])
    found = chain.encode_text(token_ids)
    for row, length in enumerate((4, 3)):
        wanted = wanted_of(chain.contrast.text_projection, seen["text"][row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1], wanted)


def wanted_of(projection, positions):
    return F.normalize(projection(positions.mean(1)), dim=-1)


def test_a_bag_of_words_learns():
    torch.manual_seed(0)
    config = replace(CONFIG, text_layers=0, visual_pooling="mean", text_pooling="mean")
    chain = build_chain(config, EVERYTHING, TOKENS)
    for kind in PAIRED:
        run(chain, make_batch(kind))["loss"].backward()
    without = [name for name, p in chain.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_recomputation_gives_the_same_step():
    found = []
    for recompute in ("none", "block"):
        torch.manual_seed(0)
        config = replace(CONFIG, recompute=recompute, dropout=0.1, drop_path=0.2)
        chain = build_chain(config, EVERYTHING, TOKENS).train()
        torch.manual_seed(1)
        out = run(chain, make_batch("video_text"))
        out["loss"].backward()
        found.append((out["loss"], {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


class Counted(torch.nn.Module):
    """A feed-forward slot around another one, which counts how often it runs."""

    def __init__(self, slot):
        super().__init__()
        self.slot, self.calls, self.seen = slot, 0, set()

    def forward(self, x, tokens):
        self.calls += 1
        self.seen |= {segment.modality for segment in tokens.segments}
        return self.slot(x, tokens)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_what_routers_say_travels_and_counts_once(recompute, kind):
    torch.manual_seed(0)
    objectives = (UniVLC(),)
    losses = NoisyRouterLossConfig(importance=0.5, load=0.0, z=0.25)
    ffn = LIMoEConfig(num_experts=4, every=1, router=TokenChoice(noise=0.0, losses=losses))
    chain = build_chain(replace(CONFIG, recompute=recompute, ffn=ffn), objectives, TOKENS)
    chain.visual_00.block.ffn = slot = Counted(chain.visual_00.block.ffn)
    batch = make_batch(kind, objectives)
    state = State.from_batch(batch, plan_layout(objectives, kind, 4, batch.num_frames))
    for layer in chain.layers:
        state = layer(state)
        if layer is chain.text_00:
            found = {name: RouterSums.unpack(sums, 3) for name, sums in state.named("router").items()}
    visual = "video" if kind == "video_text" else "image"
    assert slot.seen == {visual}
    stacks = [f"visual_{index:02d}" for index in range(CONFIG.vision_layers)]
    assert set(found) >= {*stacks, "text_00"}
    tokens = found["visual_00"].tokens_M.tolist()
    assert [bool(count) for count in tokens] == [visual == "image", visual == "video", False]
    assert found["text_00"].tokens_M.tolist() == [0, 0, int((batch.token_ids != TOKENS.pad).sum())], (
        "padding is left out"
    )
    raw = {name: state[f"loss/router/{name}"] for name in ("importance", "z")}
    total = state["loss/univlc"] + 0.5 * raw["importance"] + 0.25 * raw["z"]
    torch.testing.assert_close(state["loss"], total)
    assert 1.0 <= state[f"metric/router/experts_used_{visual}"].item() <= 4.0
    assert not any(name.endswith(("image", "video")) and not name.endswith(visual) for name in state.named("metric"))
    state["loss"].backward()
    assert slot.calls == (2 if recompute == "block" else 1)
    assert slot.slot.router.gate.weight.grad is not None


def test_the_selection_bias_moves_once_per_step_by_what_all_its_micro_batches_served():
    torch.manual_seed(0)
    losses = NoisyRouterLossConfig(importance=0.0, load=0.0)
    router = TokenChoice(noise=0.0, selection_bias_rate=0.1, losses=losses)
    ffn = LIMoEConfig(num_experts=3, every=1, router=router)
    objectives = (UniVLC(queue_size=8, batch_keys="momentum"),)
    chain = build_chain(replace(CONFIG, ffn=ffn, recompute="block"), objectives, TOKENS)
    layer = chain.visual_00
    served = torch.zeros(3)
    for size in (4, 3):
        layout = plan_layout(objectives, "image_text", size, 1)
        state = layer(chain.embed(State.from_batch(make_batch("image_text", objectives, size), layout)))
        served += RouterSums.unpack(state["router/visual_00"].detach(), 3).chosen_ME.sum(0)
        state["visual"].sum().backward()  # runs the block again
    assert torch.equal(layer.tokens_per_expert["ffn"], served)
    layer.after_step()
    wanted = 0.1 * (served.mean() - served).sign()
    assert wanted.any()
    torch.testing.assert_close(layer.block.ffn.router.bias_E, wanted)
    torch.testing.assert_close(layer.momentum_block.ffn.router.bias_E, wanted)
    layer.after_step()
    torch.testing.assert_close(layer.block.ffn.router.bias_E, wanted)
    layer.tokens_per_expert = {"ffn": served}
    layer.discard_step()
    layer.after_step()
    torch.testing.assert_close(layer.block.ffn.router.bias_E, wanted)


def test_experts_choose_the_same_tokens_when_a_block_is_recomputed():
    ffn = LIMoEConfig(num_experts=3, every=1, router=ExpertChoice())
    found = []
    for recompute in ("none", "block"):
        torch.manual_seed(0)
        chain = build_chain(replace(CONFIG, ffn=ffn, recompute=recompute), (UniVLC(), MLM()), TOKENS)
        batch = make_batch("image_text", (UniVLC(), MLM()))
        state = chain(State.from_batch(batch, plan_layout((UniVLC(), MLM()), "image_text", 4, 1)))
        state["loss"].backward()
        found.append((state, {name: one.grad for name, one in chain.named_parameters() if one.grad is not None}))
    (plain, wanted), (again, gradients) = found
    assert plain["metric/router/dropped_image"].item() > 0, "some token is left over"
    assert torch.equal(plain["loss"], again["loss"])
    assert wanted.keys() == gradients.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_a_decoder_whose_experts_would_see_the_words_to_come_is_refused():
    ffn = LIMoEConfig(num_experts=3, every=2, router=ExpertChoice())
    two = replace(CONFIG, ffn=ffn, generation_layers=2)
    with pytest.raises(ModelError, match=r"model.ffn.router.kind: got 'expert_choice' with an objective that writes"):
        build_chain(two, (UniVLC(), LM()), TOKENS)
    build_chain(two, (UniVLC(), MLM()), TOKENS)
    build_chain(replace(two, generation_layers=1), (UniVLC(), LM()), TOKENS)  # its only block is dense


def test_twins_draw_no_noise():
    chain = build_chain(replace(CONFIG, ffn=LIMoEConfig(num_experts=3, every=1)), EVERYTHING, TOKENS)
    assert chain.visual_00.block.ffn.router.noise == pytest.approx(1 / 3)
    assert chain.visual_00.momentum_block.ffn.router.noise == 0.0


def test_twins_start_equal_and_follow_after_the_step():
    torch.manual_seed(0)
    chain = build_chain(replace(CONFIG, momentum=MomentumConfig(0.75)), EVERYTHING, TOKENS)
    online, twin = chain.visual_00.block.norm1.weight, chain.visual_00.momentum_block.norm1.weight
    assert torch.equal(online, twin)
    with torch.no_grad():
        online.add_(1.0)
    run(chain, make_batch("image_text"))
    assert twin.unique().tolist() == [1.0]  # a forward pass moves nothing
    chain.after_step()
    assert twin.unique().tolist() == [1.25]
    chain.copy_to_twins()
    assert torch.equal(online, twin)


def test_twins_are_built_only_where_they_are_read():
    assert build_chain(CONFIG, (MLM(), VLM()), TOKENS).visual_00.momentum_block is None
    assert build_chain(CONFIG, (UniVLC(queue_size=4),), TOKENS).visual_00.momentum_block is not None


def test_layers_have_their_names_in_order():
    chain = build_chain(CONFIG, EVERYTHING, TOKENS)
    assert [name for name, _ in chain.named_children()] == [
        "embed",
        "visual_00",
        "visual_01",
        "visual_norm",
        "text_00",
        "text_01",
        "contrast",
        "join",
        "alignment_00",
        "alignment_01",
        "generation_00",
        "generation_01",
        "losses",
    ]


@pytest.mark.parametrize("config", [CONFIG, Unified.like(CONFIG)])
def test_the_outline_has_the_layers_and_draws_nothing(config):
    objectives = (UniVLC(queue_size=4), VLM())
    chain, random = build_chain(config, objectives, TOKENS), torch.get_rng_state()
    bare = outline(config)
    assert torch.equal(torch.get_rng_state(), random)
    assert (bare.passes, bare.named_layers.keys()) == (chain.passes, chain.named_layers.keys())
    for name, layer in chain.named_layers.items():
        assert (layer.stack, layer.level) == (bare.named_layers[name].stack, bare.named_layers[name].level)
        assert layer.stack == stack_of(name)
    assert all(parameter.is_meta for parameter in bare.parameters())


def test_encoding_equals_the_training_pass():
    torch.manual_seed(0)
    chain = build_chain(CONFIG, EVERYTHING, TOKENS).eval()
    for kind in ("image_text", "video_text"):
        batch = make_batch(kind)
        layout = plan_layout(EVERYTHING, kind, batch.size, batch.num_frames)
        state = State.from_batch(batch, layout)
        for layer in chain.layers[: chain.layers.index(chain.alignment_00)]:
            state = layer(state)
        torch.testing.assert_close(chain.encode_visual(batch.frames), state["visual_embedding"])
        torch.testing.assert_close(chain.encode_text(batch.token_ids), state["text_embedding"])


def test_matching_many_texts_with_one_image():
    torch.manual_seed(0)
    chain = build_chain(CONFIG, EVERYTHING, TOKENS).eval()
    batch = make_batch("image_text")
    rows = torch.tensor([2, 2, 0])
    together = predict(chain, "vlm", batch.frames, batch.token_ids[:3], rows)
    alone = predict(chain, "vlm", batch.frames[rows], batch.token_ids[:3])
    torch.testing.assert_close(together, alone)
    assert together[0] != together[2]


def test_absent_streams_pass_through_unchanged():
    chain = build_chain(CONFIG, (), TOKENS)
    state = State({"memory": torch.zeros(1)}, StepLayout("image_text", 1, 1, "encode"))
    for layer in chain.layers[:-1]:
        if layer is not chain.contrast:
            assert layer(state) is state


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ModelError) as error:
        build_chain(replace(CONFIG, vocab_size=49), (), TOKENS)
    assert str(error.value) == "model.vocab_size: 49 rows for a tokenizer of 50 words; set it to 50 or more"


def test_too_long_a_text_is_refused():
    chain = build_chain(CONFIG, (), TOKENS)
    with pytest.raises(ModelError, match="text of 9 tokens: the model has 8 positions"):
        chain.encode_text(torch.ones(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("text_norm", ["post", "pre"])
@pytest.mark.parametrize("kind", ["image_label", "video_label"])
def test_leaving_out_unread_positions_changes_nothing(kind, text_norm):
    objectives = (UniVLC(queue_size=16, batch_keys="momentum"),)
    found = []
    for class_only in (True, False):
        torch.manual_seed(0)
        chain = build_chain(replace(CONFIG, text_norm=text_norm), objectives, TOKENS)
        for parameter in chain.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        batch = make_batch(kind, objectives)
        layout = plan_layout(objectives, kind, batch.size, batch.num_frames)
        assert layout.class_only
        loss = chain(State.from_batch(batch, replace(layout, class_only=class_only)))["loss"]
        loss.backward()
        found.append((loss, {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}))
    (short, short_gradients), (whole, whole_gradients) = found
    torch.testing.assert_close(short, whole)
    assert short_gradients.keys() == whole_gradients.keys()
    for name, gradient in short_gradients.items():
        # Sums in another order differ by rounding, relative to the largest entry and not to each.
        bound = max(5e-6, 1e-5 * float(whole_gradients[name].abs().max()))
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=1e-4, atol=bound, msg=name)


@pytest.mark.parametrize("text_norm", ["post", "pre"])
def test_norms_stand_where_the_configuration_says(text_norm):
    """By hand for a block whose branches give nothing: post-norm normalises the stream, pre-norm leaves it alone."""
    from omnivl.parts.bert import BertBlock

    block = BertBlock(replace(replace(CONFIG, text_norm=text_norm).stacks["text"], layers=1))
    for parameter in (block.attention.out.weight, block.ffn.fc2.weight):
        parameter.data.zero_()
    x = torch.randn(2, 5, CONFIG.hidden_size) * 3 + 1
    out = block(x, torch.ones(2, 5, dtype=torch.bool)).y
    normalised = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(out, normalised, rtol=1e-4, atol=1e-4)
    inner = BertBlock(replace(replace(CONFIG, text_norm=text_norm).stacks["text"], layers=2))
    for parameter in (inner.attention.out.weight, inner.ffn.fc2.weight):
        parameter.data.zero_()
    expected = x if text_norm == "pre" else normalised
    torch.testing.assert_close(inner(x, torch.ones(2, 5, dtype=torch.bool)).y, expected, rtol=1e-4, atol=1e-4)


def test_dropped_patches_are_whole_tubes_and_only_in_training():
    from omnivl.parts.embed import drop_patches

    torch.manual_seed(0)
    places = torch.arange(6.0)[None, None, :, None] + 10 * torch.arange(2.0)[None, :, None, None]  # 10 * frame + place
    kept = drop_patches(places.expand(3, 2, 6, 1), 0.5)[..., 0]
    assert kept.shape == (3, 2, 3)  # half of six places
    assert torch.equal(kept[:, 1] - kept[:, 0], torch.full((3, 3), 10.0))  # the same places in both frames
    assert all(len(set(row.tolist())) == 3 for row in kept[:, 0])  # no place twice
    assert not torch.equal(kept[0], kept[1]) or not torch.equal(kept[1], kept[2])  # rows draw their own

    objectives = (UniVLC(),)
    chain = build_chain(replace(CONFIG, patch_dropout=0.5), objectives, TOKENS)
    batch = make_batch("image_text", objectives)
    layout = plan_layout(objectives, "image_text", batch.size, 1)
    positions = batch.frames.shape[-1] // CONFIG.patch_size * batch.frames.shape[-2] // CONFIG.patch_size
    train = chain.layers[0](State.from_batch(batch, layout))["visual"].shape[1]
    chain.eval()
    whole = chain.layers[0](State.from_batch(batch, layout))["visual"].shape[1]
    assert (train, whole) == (1 + positions // 2, 1 + positions)


def test_a_chain_with_megablocks_is_refused_where_it_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", None)
    ffn = LIMoEConfig(num_experts=3, every=1, implementation="megablocks")
    with pytest.raises(ModelError) as caught:
        build_chain(replace(CONFIG, ffn=ffn), EVERYTHING, TOKENS)
    assert str(caught.value) == (
        "model.ffn.implementation: got 'megablocks', which does not import here (import of grouped_gemm.ops halted; "
        "None in sys.modules); allowed 'auto', 'loop', 'grouped', 'batched'; pip install 'megablocks[gg]', or set it "
        "to 'auto'"
    )


def test_a_row_as_a_whole_is_its_first_position_unless_the_architecture_makes_it():
    layout = StepLayout("image_text", 2, 1, fused={"a": slice(0, 2), "b": slice(2, 4)})
    state = State({"fused": torch.arange(24.0).view(4, 3, 2)}, layout)
    assert state.pooled("b").tolist() == [[12, 13], [18, 19]]
    assert state.pooled("a", "b").tolist() == [[0, 1], [6, 7], [12, 13], [18, 19]], "end to end"
    assert state.pooled("b", "a").tolist() == [[12, 13], [18, 19], [0, 1], [6, 7]], "not so"
    pooled = state.updated(pooled=torch.arange(12.0).view(4, 3))
    assert pooled.pooled("b").tolist() == [[6, 7, 8], [9, 10, 11]]
    sizes = HeadSizes({"fused": 2}, 4, 10, 0, 8, 1, 16)
    assert (sizes.pooled, replace(sizes, widths={"fused": 2, "pooled": 3}).pooled) == (2, 3)


def test_a_decoder_without_blocks_writes_nothing():
    silent = replace(CONFIG, generation_layers=0)
    with pytest.raises(ModelError) as caught:
        build_chain(silent, (UniVLC(), LM()), TOKENS)
    assert str(caught.value) == (
        "objective 'lm' asks for the stream 'generation'; architecture 'omnivl' has visual, text, embedding, fused, "
        "masked_visual, momentum_fused; take the objective out or change model.kind"
    )
    assert "generation" in CONFIG.offers


@pytest.mark.parametrize("changes", [{}, {"text_norm": "pre"}, {"recompute": "block"}, {"recompute": "ffn"}])
def test_gradients_added_in_products_are_those_of_autograd(
    changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an accelerator takes them (``moe.linear.linear_beside``), here on a CPU."""
    config, found = replace(CONFIG, **changes), []
    for added in (True, False):
        monkeypatch.setattr(
            "moe.linear.adds_in_products", lambda x, added=added: added and torch.is_grad_enabled() and x.requires_grad
        )
        torch.manual_seed(0)
        chain = build_chain(config, EVERYTHING, TOKENS)
        torch.manual_seed(1)
        loss = run(chain, make_batch("image_text"))["loss"]
        loss.backward()
        found.append((loss.item(), {name: one.grad for name, one in chain.named_parameters() if one.grad is not None}))
    (loss, gradients), (usual_loss, usual) = found
    assert loss == usual_loss
    assert gradients.keys() == usual.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, usual[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
