"""FLAVA: parity with transformers' classes through files on disk, sizes, export, what it refuses, what it trains."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_towers import TOKENS, scattered
from transformers import AutoModel, FlavaConfig, FlavaForPreTraining, FlavaModel

from moe.config import LIMoEConfig
from omnivl.architectures import FLAVA
from omnivl.architectures.build import build_chain
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.positions import prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import ModelError
from omnivl.inference.predict import predict
from omnivl.objectives import ITC, LM, MLM, MMM, MRM, Objective, PrepareContext, UniVLC
from omnivl.objectives.codes import RandomCodebook
from omnivl.parts import attention
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import MomentumConfig, Transformer
from omnivl.pretrained.load import load_pretrained

NEAR = {"rtol": 2e-5, "atol": 2e-5}
WIDE = Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-12)
SMALL = FLAVA(
    **{"vision": WIDE, "text": WIDE, "fusion": WIDE},
    **{"image_size": 16, "patch_size": 4, "text_length": 7, "vocab_size": 50, "projection_size": 8},
)
CODEBOOK = RandomCodebook(num_codes=11, width=3)
PAIRS: tuple[Objective, ...] = (ITC(), MMM(probability=0.5, replaced=0.4, codebook=CODEBOOK, min_block=2))
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def peer_of(cls, **options):
    config = FlavaConfig(
        image_config={**SIZES, "image_size": 16, "patch_size": 4, "vocab_size": 11, **options},
        text_config={**SIZES, "vocab_size": 50, "max_position_embeddings": 7},
        multimodal_config=SIZES,
        **{"hidden_size": 16, "projection_dim": 8, "init_codebook": False},
    )
    return scattered(cls(config))


def loaded(peer, folder, objectives=(), model=SMALL, normalised=0.5):
    """A chain with a peer's weights, whose pixels are normalised by one mean and deviation; None: as CLIP's."""
    peer.save_pretrained(folder)
    if normalised is not None:
        said = {"do_normalize": True, "image_mean": [normalised] * 3, "image_std": [normalised] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    chain = build_chain(model, objectives, TOKENS)
    return chain, load_pretrained(chain, model, folder)


def inputs_of():
    frames = torch.randint(0, 256, (4, 1, 3, 16, 16), dtype=torch.uint8)
    token_ids = torch.where(MASK == 1, torch.randint(5, 50, (4, 7)), TOKENS.pad)
    return frames, token_ids


def pixels(frames):
    return frames[:, 0].float() / 127.5 - 1.0


def before_losses(chain, frames, token_ids):
    """The state that losses would read of pairs of which everything is read."""
    reads = frozenset({"visual", "text", "visual_embedding", "text_embedding", "fused_visual", "pooled"})
    layout = lay_out({"all": Demands(joins={"all": Join()}, reads=reads)}, "image_text", len(frames), 1, "predict")
    state = State({"frames": frames, "token_ids": token_ids}, layout)
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


def check_gradients(chain, peer, folder):
    """Every gradient of ours is that of the peer's parameter; returns the number of those that have one."""
    theirs = dict(peer.named_parameters(remove_duplicate=False))
    given = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in theirs.items()}
    wanted = SMALL.from_foreign(given, folder)
    types = peer.get_submodule("flava" if hasattr(peer, "flava") else "").text_model.embeddings
    compared = 0
    for name, parameter in chain.named_parameters():
        if parameter.grad is None:
            continue
        compared += 1
        value = wanted[name]
        if name == "embed.block.text.positions":
            value = value - types.token_type_embeddings.weight.grad[0]
        torch.testing.assert_close(parameter.grad, value.view_as(parameter), rtol=2e-4, atol=3e-5, msg=name)
    return compared


def test_streams_and_gradients_equal_transformers(tmp_path):
    torch.manual_seed(0)
    peer = peer_of(FlavaModel)
    chain, report = loaded(peer, tmp_path)
    assert report.missing == ()
    poolers = {f"{model}.pooler.dense.{end}" for model in ("image_model", "text_model") for end in ("weight", "bias")}
    assert set(report.unexpected) == poolers
    frames, token_ids = inputs_of()
    state = before_losses(chain, frames, token_ids)
    wanted = peer(pixel_values=pixels(frames), input_ids=token_ids, attention_mask=MASK)
    places = MASK == 1
    fused = wanted.multimodal_embeddings
    embedded = (
        F.normalize(peer.image_projection(wanted.image_embeddings[:, 0]), dim=-1),
        F.normalize(peer.text_projection(wanted.text_embeddings[:, 0]), dim=-1),
    )
    read = [
        (state.rows("visual", "clean"), wanted.image_embeddings),
        (state.rows("text", "clean")[places], wanted.text_embeddings[places]),
        (state["visual_embedding"], embedded[0]),
        (state["text_embedding"], embedded[1]),
        # There: class token, image, text.
        (state.rows("fused", "all")[places], fused[:, 18:][places]),
        (state.rows("fused_visual", "all"), fused[:, 1:18]),
        (state.pooled("all"), wanted.multimodal_output.pooler_output),
    ]
    for one, other in read:
        torch.testing.assert_close(one, other, **NEAR)
    directions = [torch.randn_like(one) for one, _ in read]
    for side in (0, 1):
        sum((pair[side] * direction).sum() for pair, direction in zip(read, directions, strict=True)).backward()
    without = {"contrast.logit_scale", "embed.block.visual.mask_token"}
    assert check_gradients(chain, peer, tmp_path) == len(list(chain.parameters())) - len(without)


def test_pixels_of_its_processor_are_folded_into_the_patches(tmp_path):
    torch.manual_seed(0)
    peer = peer_of(FlavaModel)
    chain, _ = loaded(peer, tmp_path, normalised=None)
    frames, token_ids = inputs_of()
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    wanted = peer.image_model((frames[:, 0].float() / 255.0 - mean) / std).last_hidden_state
    torch.testing.assert_close(before_losses(chain, frames, token_ids).rows("visual", "clean"), wanted, **NEAR)


def prepared(objectives, batch):
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    drawn = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=drawn)


def codes_of(head, frames):
    """The codes of all patches, ``[B, N]``, as the head computes them."""
    patches = pixels(frames).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return head.codebook(patches.flatten(0, 1)).view(len(frames), -1)


@pytest.mark.parametrize("replaced", [0.0, 0.4])
def test_losses_on_pairs_and_gradients_equal_transformers(tmp_path, replaced):
    torch.manual_seed(0)
    peer = peer_of(FlavaForPreTraining)
    objectives = (ITC(), replace(PAIRS[1], replaced=replaced))
    chain, report = loaded(peer, tmp_path, objectives)
    assert report.missing == ()
    unread = ("mim_head", "mlm_head", "image_model.pooler", "text_model.pooler")
    left = {"losses.vocabulary", "losses.heads.mrm", *unread} | (
        {"losses.heads.mmm.match"} if replaced == 0.0 else set()
    )
    assert all(name.startswith(tuple(left)) for name in report.unexpected), report.unexpected
    frames, token_ids = inputs_of()
    batch = prepared(objectives, Batch("image_text", frames, token_ids, *torch.arange(12).view(3, 4)))
    layout = plan_layout(objectives, "image_text", 4, 1)
    state = State.from_batch(batch, layout)
    out = chain(state)
    chosen = objectives[1].draw(state, chain.join.gather) if replaced else None
    matches = chosen.leaves["mmm/matches"] if replaced else torch.ones(4, dtype=torch.bool)
    rows = chosen.rows["mmm"] if replaced else torch.arange(4)
    assert replaced == 0.0 or 0 < matches.sum() < 4
    masked = batch.prepared["mmm/mask"].view(4, -1)
    codes = codes_of(chain.losses.heads["mmm"].patches.codes, frames)
    assert len(codes.unique()) > 3
    given = {"pixel_values": pixels(frames), "attention_mask": MASK[rows], "bool_masked_pos": masked}
    given |= {"mim_labels": codes.clone(), "mlm_labels": batch.prepared["mmm/targets"][rows].clone()}
    given |= {"input_ids": token_ids[rows], "input_ids_masked": batch.prepared["mmm/token_ids"][rows]}
    wanted = peer(**given, itm_labels=matches.long())
    metrics = out.named("metric/mmm")
    torch.testing.assert_close(metrics["text"], wanted.loss_info.mmm_text, **NEAR)
    torch.testing.assert_close(metrics["image"], wanted.loss_info.mmm_image, **NEAR)
    if replaced:
        torch.testing.assert_close(metrics["match"], wanted.loss_info.itm, **NEAR)
    else:  # there it is computed all the same: here the pairs have no other texts
        torch.testing.assert_close(out["loss/itc"], wanted.loss_info.global_contrastive, **NEAR)
        out["loss"].backward()
        (wanted.loss_info.mmm_text + wanted.loss_info.mmm_image + wanted.loss_info.global_contrastive).backward()
        assert check_gradients(chain, peer, tmp_path) == len(list(chain.parameters())) - 2, "all but the pooler"
        return
    out["loss/mmm"].backward()
    (wanted.loss_info.mmm_text + wanted.loss_info.mmm_image + wanted.loss_info.itm).backward()
    contrast = {name for name, _ in chain.named_parameters() if name.startswith(("contrast.", "encoded.block.norms"))}
    assert check_gradients(chain, peer, tmp_path) == len(list(chain.parameters())) - len(contrast)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_losses_on_one_modality_and_gradients_equal_transformers(tmp_path, kind):
    torch.manual_seed(0)
    peer = peer_of(FlavaForPreTraining)
    alone = MRM(probability=0.4, codebook=CODEBOOK) if kind == "image" else MLM(grounded=False, probability=0.5)
    chain, _ = loaded(peer, tmp_path, (alone,))
    frames, token_ids = inputs_of()
    shown, read = (frames, None) if kind == "image" else (None, token_ids)
    batch = prepared((alone,), Batch(kind, shown, read, *torch.arange(12).view(3, 4)))
    out = chain(State.from_batch(batch, plan_layout((alone,), kind, 4, 1)))
    if kind == "image":
        codes = codes_of(chain.losses.heads["mrm"].codes, frames)
        masked = batch.prepared["mrm/mask"].view(4, -1)
        wanted = peer(pixel_values=pixels(frames), bool_masked_pos=masked, mim_labels=codes.clone()).loss_info.mim
    else:
        given = {"input_ids": token_ids, "input_ids_masked": batch.prepared["mlm/token_ids"], "attention_mask": MASK}
        wanted = peer(**given, mlm_labels=batch.prepared["mlm/targets"].clone()).loss_info.mlm
    torch.testing.assert_close(out["loss"], wanted, **NEAR)
    out["loss"].backward()
    wanted.backward()
    stack = "visual" if kind == "image" else "text"
    trained = ("embed.block." + stack, stack + "_", "encoded.block.norms." + stack, "losses.")
    assert check_gradients(chain, peer, tmp_path) == sum(
        name.startswith(trained) for name, _ in chain.named_parameters()
    )


def test_an_exported_model_is_transformers_class(tmp_path):
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, PAIRS, TOKENS)).eval()
    foreign = SMALL.to_foreign(chain, TOKENS)
    assert foreign.model == "FlavaModel"
    assert foreign.left_out and all(name.startswith("losses.heads.mmm.") for name in foreign.left_out)
    (tmp_path / "config.json").write_text(json.dumps(foreign.config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(foreign.image_processor))
    save_file({name: one.contiguous() for name, one in foreign.weights.items()}, tmp_path / "model.safetensors")
    peer, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(peer, FlavaModel)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    frames, token_ids = inputs_of()
    with torch.no_grad():
        state = before_losses(chain, frames, token_ids)
        wanted = peer(pixel_values=pixels(frames), input_ids=token_ids, attention_mask=MASK)
    torch.testing.assert_close(state.rows("visual", "clean"), wanted.image_embeddings, **NEAR)
    torch.testing.assert_close(state.rows("fused_visual", "all"), wanted.multimodal_embeddings[:, 1:18], **NEAR)
    torch.testing.assert_close(state.pooled("all"), wanted.multimodal_output.pooler_output, **NEAR)
    torch.testing.assert_close(peer.logit_scale, chain.contrast.scale().log())
    again = build_chain(SMALL, (), TOKENS)
    report = load_pretrained(again, SMALL, tmp_path)
    assert report.missing == ()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, chain.get_parameter(name), rtol=1e-6, atol=1e-6, msg=name)


def test_the_published_configuration_has_the_published_size():
    with torch.device("meta"):
        chain, peer = build_chain(FLAVA(), (), TOKENS), FlavaModel(FlavaConfig())
    own, theirs = (sum(parameter.numel() for parameter in model.parameters()) for model in (chain, peer))
    # There: poolers of both encoders, 512 positions, two token types of which one is folded into them.
    assert own + 2 * (768 * 768 + 768) + (512 - 77) * 768 + 2 * 768 == theirs == 241_356_289


def make_batch(objectives, kind="image_text"):
    frames, token_ids = inputs_of()
    token_ids[:, 0] = TOKENS.cls
    shown, read = None if kind == "text" else frames, None if kind == "image" else token_ids
    return prepared(objectives, Batch(kind, shown, read, *torch.arange(12).view(3, 4)))


@pytest.mark.parametrize("ffn", [WIDE.ffn, LIMoEConfig(num_experts=4, every=1, implementation="loop")])
@pytest.mark.parametrize(
    ("objectives", "kind"),
    [
        (PAIRS, "image_text"),
        (PAIRS[:1], "image_text"),
        (PAIRS[1:], "image_text"),
        ((MMM(replaced=0.0, codebook=None),), "image_text"),
        ((MRM(codebook=CODEBOOK),), "image"),
        ((MLM(grounded=False),), "text"),
        ((*PAIRS, MLM(grounded=False), MRM()), "image_text"),
    ],
)
def test_idle_parameters_are_those_without_a_gradient(objectives, kind, ffn):
    torch.manual_seed(0)
    model = replace(SMALL, **{name: replace(WIDE, ffn=ffn) for name in ("vision", "text", "fusion")})
    chain = build_chain(model, objectives, TOKENS)
    layout = plan_layout(objectives, kind, 4, 1)
    out = chain(State.from_batch(make_batch(objectives, kind), layout))
    assert out.named("loss").keys() >= {objective.key for objective in objectives}
    out["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_losses_fall():
    torch.manual_seed(0)
    chain = build_chain(SMALL, PAIRS, TOKENS)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    state, runs = State.from_batch(make_batch(PAIRS), plan_layout(PAIRS, "image_text", 4, 1)), []
    for _ in range(60):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        parts = {name: out[f"metric/mmm/{name}"].item() for name in ("text", "image", "match")}
        runs.append({"itc": out["loss/itc"].item(), **parts})
    for name, first in runs[0].items():
        assert runs[-1][name] < 0.6 * first, name


@pytest.mark.parametrize("further", [(MLM(grounded=False),), ()])
def test_operations_are_what_torch_counts(monkeypatch, further):
    """With a vocabulary head beside the one of masked pairs, and without."""
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    monkeypatch.setattr(MLM, "restored_words", property(lambda self: {self.key: 1 / 7}))
    objectives = (ITC(), MMM(replaced=0.0, codebook=None), *further)
    wide = {name: replace(WIDE, hidden_size=64) for name in ("vision", "text", "fusion")}
    chain = build_chain(replace(SMALL, **wide, projection_size=1), objectives, TOKENS)
    batch, targets = make_batch(objectives), torch.full((4, 7), -100)
    batch = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == TOKENS.pad, 9))
    targets[:, 1] = 5  # one of seven positions of each text, which are chosen in whole quarters of the rows
    keys = [one.key for one in objectives[1:]]
    given = {f"{key}/token_ids": batch.token_ids for key in keys}
    for key in keys:
        given |= prepared_targets(key, targets)
    monkeypatch.setattr(MMM, "restored_words", property(lambda self: {self.key: 1 / 7}))
    layout = plan_layout(objectives, "image_text", 4, 1)
    state = State.from_batch(batch, layout).merged(given)
    with FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    scores = 3 * 4 * 2 * 64 * (64 + TOKENS.vocab_size)  # of one word of each text
    assert chain.losses.flops(layout, None) == pytest.approx(scores * len(keys))
    # The map of masked patches to pixels is not counted.
    patches = 6 * int(state["mmm/mask"].sum()) * 64 * 48
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout) + patches, rel=5e-3)


def test_each_text_is_matched_with_the_image_that_it_is_given():
    torch.manual_seed(0)
    chain = scattered(build_chain(SMALL, PAIRS, TOKENS)).eval()
    frames, token_ids = inputs_of()
    pairs = predict(chain, "mmm", frames, token_ids)
    crossed = predict(chain, "mmm", frames, token_ids.repeat(2, 1), torch.tensor([0, 1, 2, 3, 1, 0, 3, 2]))
    torch.testing.assert_close(crossed[:4], pairs)
    assert not torch.allclose(crossed[4:], pairs)


@pytest.mark.parametrize("objective", [UniVLC(queue_size=4), LM()], ids=lambda one: one.key)
def test_what_it_lacks_is_refused(objective):
    with pytest.raises(ModelError, match=r"need momentum twins|asks for the stream 'generation'"):
        build_chain(SMALL, (objective,), TOKENS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 18}, "model.image_size: got 18; allowed a multiple of patch_size 4; change either"),
        ({"vision": {"norm": "post"}}, "model.vision.norm: got 'post'; allowed 'pre' in 'flava'; set it to 'pre'"),
        ({"fusion": {"layers": 0}}, "model.fusion.layers: got 0; allowed 1 or more; raise it, e.g. to 12"),
        (
            {"fusion": {"hidden_size": 32}},
            "model.fusion.hidden_size: got 32; allowed text.hidden_size 16; make them equal: words have one head",
        ),
        (
            {"fusion": {"activation": "quick_gelu"}},
            "model.fusion.activation: got 'quick_gelu'; allowed 'gelu' there; set it to 'gelu'",
        ),
        ({"text": {"drop_path": 0.1}}, "model.text.drop_path: got 0.1; allowed 0; blocks that read texts have none"),
        (
            {"momentum": MomentumConfig()},
            "model.momentum: got momentum twins; allowed null in 'flava', which has none; set it to null",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(model, message):
    changed = {
        name: replace(getattr(SMALL, name), **value) if isinstance(value, dict) else value
        for name, value in model.items()
    }
    with pytest.raises(ModelError) as caught:
        build_chain(replace(SMALL, **changed), (), TOKENS)
    assert str(caught.value) == message


def test_weights_that_would_be_computed_otherwise_are_refused(tmp_path):
    with pytest.raises(ModelError) as caught:
        loaded(peer_of(FlavaModel, hidden_act="relu", layer_norm_eps=1e-6), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: model.vision.activation: got 'gelu'; allowed 'relu' with these weights; set it, or give other "
        f"weights\n{tmp_path}: model.vision.norm_eps: got 1e-12; allowed 1e-06 with these weights; set it, or give "
        "other weights"
    )


def test_experts_have_no_class_to_be_exported_to():
    model = replace(SMALL, text=replace(WIDE, ffn=LIMoEConfig(num_experts=4, every=1, implementation="loop")))
    with pytest.raises(ModelError, match=r"model\.text: got 'limoe' feed-forward layers, layer_scale_init None"):
        model.to_foreign(build_chain(model, (), TOKENS), TOKENS)
