"""CoCa: parity with open_clip's class through files on disk, what its halves share, writing, what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peer_open_clip import import_open_clip
from small_clip import TOKENS
from small_coca import OBJECTIVES, RELEASED, SMALL, coca_batch, of_one_width, peer, run, saved, scattered

from moe.config import LIMoEConfig
from moe.routers import ExpertChoice
from omnivl.architectures.base import check
from omnivl.architectures.build import build_chain
from omnivl.architectures.coca import CoCa
from omnivl.architectures.coca_names import from_open_clip
from omnivl.chain.chain import text_layout, visual_layout
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import ModelError
from omnivl.inference.generate import caption_search, generate
from omnivl.objectives import ITC, LM, MLM, MRM, VLM, PrepareContext
from omnivl.parts import attention
from omnivl.parts.sizes import MomentumConfig
from omnivl.pretrained.load import load_pretrained

OURS = {"mean": [0.5] * 3, "std": [0.5] * 3}
CASES = {
    "as released": RELEASED,
    "the closing token sees itself": replace(RELEASED, closing="own"),
    "quick gelu": replace(
        RELEASED,
        **{
            name: replace(getattr(RELEASED, name), activation="quick_gelu") for name in ("vision", "text", "multimodal")
        },
    ),
    "cascade": of_one_width("cascade"),
    "parallel": of_one_width("parallel"),
}


def outputs(model, pixels, token_ids):
    """What open_clip's class gives; with two poolers its embedding of an image has a dimension more than it reads."""
    latent, seen = model.visual(pixels)
    image = F.normalize(latent.reshape(len(pixels), -1), dim=-1)
    made = model(pixels, token_ids, image_latent=image, image_embs=seen)
    return image, made["text_features"], made["logits"], made["labels"], made["logit_scale"]


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_losses_embeddings_and_gradients_are_those_of_open_clip(config, tmp_path):
    model, batch = peer(config, config.vision.activation == "quick_gelu"), coca_batch()
    chain = scattered(config)
    report = load_pretrained(chain, config, saved(model, config, tmp_path, **OURS))
    assert (report.missing, report.unexpected, report.resized) == ((), (), {})
    parameters = dict(chain.named_parameters())
    assert set(report.matched) == parameters.keys()
    image, text, logits, labels, scale = outputs(model, batch.frames[:, 0] / 127.5 - 1, batch.token_ids)
    torch.testing.assert_close(chain.encode_visual(batch.frames), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chain.encode_text(batch.token_ids), text, rtol=1e-4, atol=1e-5)
    loss = import_open_clip().loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    contrast, captions = loss(image, text, logits, labels, scale)
    out = run(chain, batch)
    torch.testing.assert_close(out["loss/itc"], contrast)
    torch.testing.assert_close(2 * out["loss/lm"], captions)
    torch.testing.assert_close(out["loss"], contrast + captions)
    out["loss"].backward()
    (contrast + captions).backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    # The closing token and its position are one vector here, which has the gradient of either.
    torch.testing.assert_close(theirs["text.cls_emb"], theirs["text.positional_embedding"][-1])
    theirs["text.cls_emb"] = torch.zeros_like(theirs["text.cls_emb"])
    own = {name: getattr(config, name) for name in ("pooling", "pooler_heads", "alternates", "closing")}
    file = tmp_path / "open_clip_pytorch_model.bin"
    gradients = from_open_clip(theirs, file, config.vision, config.text, config.multimodal, own)
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_pixels_of_another_mean_are_folded_in(tmp_path):
    model, batch, chain = peer(RELEASED), coca_batch(), scattered(RELEASED)
    load_pretrained(chain, RELEASED, saved(model, RELEASED, tmp_path))  # CLIP's mean, as nothing else is said
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = (batch.frames[:, 0] / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    image = outputs(model, pixels, batch.token_ids)[0]
    torch.testing.assert_close(chain.encode_visual(batch.frames), image, rtol=1e-4, atol=1e-5)


def test_weights_that_ask_for_other_options_are_refused(tmp_path):
    path = saved(peer(RELEASED), RELEASED, tmp_path)
    stack = replace(SMALL.text, num_heads=2)
    other = replace(SMALL, text=stack, multimodal=stack, pooler_heads=3)
    with pytest.raises(ModelError) as caught:
        load_pretrained(scattered(other), other, path)
    wanted = [
        "model.pooling: got 'cascade'; allowed 'joint' with these weights",
        "model.alternates: got False; allowed True with these weights",
        "model.closing: got 'own'; allowed 'released' with these weights",
        "model.pooler_heads: got 3; allowed 2 with these weights",
        "model.text.num_heads: got 2; allowed 3 with these weights",
        "model.multimodal.num_heads: got 2; allowed 3 with these weights",
    ]
    assert str(caught.value).split("\n") == [f"{path}: {one}; set it, or give other weights" for one in wanted]


def test_weights_of_another_class_are_told_apart(tmp_path):
    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "clip.bin")
    with pytest.raises(ModelError, match="got weights that architecture 'coca' does not know"):
        load_pretrained(scattered(SMALL), SMALL, tmp_path / "clip.bin")


@pytest.mark.parametrize("closing", ["own", "released"])
def test_captions_that_go_on_from_the_text_are_those_that_pass_the_lower_half_themselves(closing):
    config, batch = replace(SMALL, closing=closing), coca_batch()
    chain, captions = scattered(config), OBJECTIVES[1:]
    both = run(chain, batch)
    both["loss/lm"].backward()
    gradients = {name: one.grad.clone() for name, one in chain.named_parameters() if one.grad is not None}
    chain.zero_grad()
    alone = run(chain, batch, captions)
    alone["loss/lm"].backward()
    torch.testing.assert_close(alone["loss/lm"], both["loss/lm"])
    for name, one in chain.named_parameters():
        if one.grad is not None:
            torch.testing.assert_close(one.grad, gradients[name], msg=name)


@pytest.mark.parametrize("closing", ["own", "released"])
def test_an_embedding_does_not_depend_on_padding(closing):
    """Nor on whether positions of padding are left out."""
    chain = scattered(replace(SMALL, closing=closing))
    token_ids = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]])
    whole = chain.encode_text(token_ids)
    torch.testing.assert_close(chain.encode_text(token_ids[:, :4]), whole)
    torch.testing.assert_close(chain.encode_text(token_ids[1:, :3]), whole[1:])
    layout = plan_layout(OBJECTIVES, "image_text", 2, 1)
    batch = Batch("image_text", torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8), token_ids, *[torch.arange(2)] * 3)
    kept = chain.embed.kept_positions(State.from_batch(batch, replace(layout, generation={})))
    first = 5 if closing == "own" else 6  # three words, start and end; and a padding that is seen
    assert kept["kept/text"].tolist()[:first] == list(range(first))
    assert len(kept["kept/text"]) == {"own": 9, "released": 11}[closing], "2 texts of 4 and 3 tokens"


def test_the_closing_token_is_the_last_that_is_read():
    """Worked by hand: one text, one block without weights but the norm; the token's state is its own embedding."""
    chain = scattered(SMALL)
    for layer in ("text_00", "text_01"):
        block = chain.get_submodule(layer).block
        for part in (block.attention.out, block.ffn.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    norm, projection = chain.text_norm.block, chain.contrast.text_projection
    closing = chain.embed.block.text.closing
    with torch.no_grad():
        wanted = F.normalize(F.layer_norm(closing, (12,), norm.weight, norm.bias, 1e-5) @ projection.weight.t(), dim=0)
        made = chain.encode_text(torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0], [1, 9, 49, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(made, wanted.expand(2, -1))


@pytest.mark.parametrize("config", [SMALL, RELEASED], ids=["paper", "released"])
def test_captions_are_written_as_they_are_learnt(config):
    """Greedy texts with and without a cache, and word by word by the logits of a training step's forward pass."""
    chain, batch = scattered(config).eval(), coca_batch()
    options = caption_search(TOKENS, 6)
    with torch.no_grad():
        made = [generate(chain, "lm", batch.frames, options, cached=cached) for cached in (True, False)]
        torch.testing.assert_close(made[0].token_ids, made[1].token_ids)
        torch.testing.assert_close(made[0].log_probability, made[1].log_probability)
        texts = torch.cat([torch.full((4, 1), TOKENS.cls), made[0].token_ids, torch.zeros(4, 1).long()], dim=1)
        lm = LM(label_smoothing=0.0)
        told = replace(batch, token_ids=texts)
        total = 0.0
        for row in range(4):  # the loss of a text of n words is minus the log probability over n
            own = Batch(
                "image_text", told.frames[row : row + 1], texts[row : row + 1], *[torch.arange(1)] * 3, prepared={}
            )
            words = (texts[row, 1:] != TOKENS.pad).sum()
            inputs = texts[row : row + 1].clone()
            inputs[inputs == TOKENS.sep] = TOKENS.pad
            targets = texts[row : row + 1].roll(-1, 1)
            targets[:, -1] = 0
            targets[targets == 0] = -100
            prepared = {"lm/token_ids": inputs, "lm/targets": targets}
            loss = run(chain, replace(own, prepared=prepared), (lm,))["loss/lm"]
            # The search leaves out special tokens: its probabilities are larger by what these would have had.
            assert -loss * words <= made[0].log_probability[row] + 1e-4
            total += float(loss)
    assert total > 0


def test_a_clip_of_one_picture_is_pooled_as_the_picture():
    """Poolers attend to the positions of all frames: copies change nothing."""
    chain, frames = scattered(SMALL), coca_batch().frames
    torch.testing.assert_close(chain.encode_visual(frames.expand(-1, 3, -1, -1, -1)), chain.encode_visual(frames))


def test_what_no_loss_reads_is_idle():
    layouts = {
        "contrast": ((OBJECTIVES[0],), {"generation_00", "generation_01", "losses"}),
        "captions": ((OBJECTIVES[1],), {"text_norm", "contrast"}),
    }
    for pooling in ("cascade", "parallel", "joint"):
        config = replace(SMALL, pooling=pooling)
        for name, (objectives, resting) in layouts.items():
            chain, batch = scattered(config), coca_batch(objectives)
            run(chain, batch, objectives)["loss"].backward()
            layout = plan_layout(objectives, "image_text", 4, 1)
            idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([layout])}
            for parameter, one in chain.named_parameters():
                assert (one.grad is None) == (id(one) in idle), f"{pooling}, {name}: {parameter}"
            still = {n.split(".")[0] for n, one in chain.named_parameters() if id(one) in idle}
            assert still >= resting & {n.split(".")[0] for n, _ in chain.named_parameters()}


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("config", [*CASES.values(), SMALL])
def test_operations_are_what_torch_counts(monkeypatch, config, together, kind):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    objectives = OBJECTIVES if together else OBJECTIVES[1:]
    chain = scattered(replace(config, projection_size=1), objectives)
    batch = coca_batch(kind=kind)
    full = replace(batch, token_ids=torch.tensor([[1, *range(5, 11), 49]] * 4), prepared={})
    context = PrepareContext(0, "test", TOKENS, config.inputs.grid(False), 0)
    batch = replace(full, prepared=OBJECTIVES[1].prepare(full, context))
    with FlopCounterMode(display=False) as counter:
        run(chain, batch, objectives)["loss"].backward()
    counted = chain_flops(chain, plan_layout(objectives, kind, 4, batch.num_frames), 4 * 8)
    assert counter.get_total_flops() == pytest.approx(counted, rel=3e-3)


def test_sizes_are_those_of_the_paper_s_table():
    """The survey's counts of the largest one: blocks 1.009 B, 454 M and 597 M, words 90 M."""
    with torch.device("meta"):
        chain = build_chain(CoCa.presets["full"], OBJECTIVES, TOKENS)
    sizes = {name: sum(one.numel() for one in layer.parameters()) for name, layer in chain.named_layers.items()}
    visual = sum(size for name, size in sizes.items() if name.startswith("visual_") and name != "visual_pool")
    assert visual == 40 * (4 * 1408**2 + 2 * 1408 * 6144 + 9 * 1408 + 6144) == 1_010_007_040
    assert sum(size for name, size in sizes.items() if name.startswith("text_0") or name.startswith("text_1")) == (
        18 * 25_250_176
    )
    assert sum(size for name, size in sizes.items() if name.startswith("generation")) == 18 * 33_188_480 + 2 * 1408
    assert chain.embed.block.text.words.numel() == 64000 * 1408 == 90_112_000
    for preset, text, total in (("base", 297e6, 383e6), ("large", 484e6, 787e6)):
        with torch.device("meta"):
            chain = build_chain(CoCa.presets[preset], OBJECTIVES, TOKENS)
        sizes = {name: sum(one.numel() for one in layer.parameters()) for name, layer in chain.named_layers.items()}
        words = sum(one.numel() for one in chain.embed.block.text.parameters())
        written = sum(size for name, size in sizes.items() if name.startswith(("text", "generation", "losses")))
        assert words + written == pytest.approx(text, rel=0.003)
        assert sum(sizes.values()) - sizes["visual_pool"] - sizes["contrast"] == pytest.approx(total, rel=0.003)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"multimodal": replace(SMALL.multimodal, hidden_size=24)},
            "model.multimodal.hidden_size: got 24; allowed text.hidden_size 12; make them equal",
        ),
        ({"pooler_heads": 5}, "model.text.hidden_size: got 12; allowed a multiple of pooler_heads 5; change either"),
        (
            {"text": replace(SMALL.text, norm="post")},
            "model.text.norm: got 'post'; allowed 'pre' in 'coca'; set it to 'pre'",
        ),
        (
            {"text": replace(SMALL.text, drop_path=0.1)},
            "model.text.drop_path: got 0.1; allowed 0; blocks that read texts have none",
        ),
        (
            {"alternates": True, "multimodal": replace(SMALL.multimodal, ffn=LIMoEConfig())},
            "model.multimodal.ffn.kind: got 'limoe'; allowed 'dense' where blocks alternate; set it to 'dense', or "
            "alternates to false",
        ),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'coca', which has none; set it to null",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ModelError) as caught:
        check(replace(SMALL, **change))
    assert str(caught.value) == message


@pytest.mark.parametrize(("objective", "stream"), [(VLM(), "fused"), (MRM(targets="pixels"), "masked_visual")])
def test_objectives_on_streams_that_it_lacks_are_refused(objective, stream):
    with pytest.raises(ModelError) as caught:
        build_chain(SMALL, (objective,), TOKENS)
    assert f"asks for the stream {stream!r}; architecture 'coca' has visual, text, embedding, generation" in str(
        caught.value
    )


def test_without_an_upper_half_it_writes_nothing():
    silent = replace(SMALL, multimodal=replace(SMALL.multimodal, layers=0))
    with pytest.raises(ModelError, match="objective 'lm' asks for the stream 'generation'"):
        build_chain(silent, OBJECTIVES, TOKENS)
    chain = scattered(silent, (ITC(),))
    assert torch.isfinite(run(chain, coca_batch((ITC(),)), (ITC(),))["loss"])


def test_the_states_of_words_and_queries_are_kept_where_they_are_asked_for():
    chain, batch = scattered(SMALL), coca_batch()
    texts = chain.fold(State({"token_ids": batch.token_ids}, text_layout(4)))
    pictures = chain.fold(State({"frames": batch.frames}, visual_layout(batch.frames)))
    assert (texts["text"].shape, pictures["visual"].shape) == ((4, 8, 12), (4, 3, 12))
    torch.testing.assert_close(texts["text_embedding"], chain.encode_text(batch.token_ids))
    torch.testing.assert_close(pictures["visual_embedding"], chain.encode_visual(batch.frames))


def test_masked_words_are_read_by_the_lower_half():
    objectives = (ITC(), MLM(grounded=False))
    chain, batch = scattered(SMALL, objectives), coca_batch(objectives)
    out = run(chain, batch, objectives)
    assert torch.isfinite(out["loss/mlm"])


@pytest.mark.parametrize("name", ["text", "multimodal"])
def test_a_router_that_looks_at_words_to_come_is_refused_where_captions_pass(name):
    router = ExpertChoice()
    config = replace(SMALL, **{name: replace(SMALL.text, ffn=LIMoEConfig(router=router))})
    with pytest.raises(ModelError, match="got 'expert_choice' with an objective that writes"):
        build_chain(config, OBJECTIVES, TOKENS)
    chain = scattered(replace(SMALL, **{name: replace(SMALL.text, ffn=LIMoEConfig())}))
    out = run(chain, coca_batch())
    assert "router" in {loss.split("/")[0] for loss in out.named("loss")}
    assert torch.isfinite(out["loss"])
