"""One transformer for all tokens: its two passes, its weights by modality, its experts."""

from dataclasses import replace

import pytest
import torch
from tiny_chain import CONFIG, EVERYTHING, TOKENS, make_batch

from moe.config import AttributeConfig, LIMoEConfig, MoMEConfig
from moe.routers import NoisyRouterLossConfig, TokenChoice
from moe.routers.sums import RouterSums
from omnivl.architectures import OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import DATA_KINDS
from omnivl.errors import ModelError
from omnivl.inference.predict import predict
from omnivl.objectives import LM, MLM, MRM, VLM, UniVLC
from omnivl.parts.attributes import attributes_of
from omnivl.parts.embed import Embed
from omnivl.parts.streams import ByAttributes, ByModality, Part, Stream
from omnivl.parts.unified import UnifiedBlock, UnifiedLayer, UnifiedNorm
from omnivl.parts.vit import DividedBlock

PAIRED = DATA_KINDS[:4]  # something to see, with a text

UNIFIED = Unified.like(CONFIG)


def block_of(config: Unified, index: int = 0) -> UnifiedBlock:
    return UnifiedBlock(config.stacks["unified"], index, config.variant)


OBJECTIVES = tuple(objective for objective in EVERYTHING if not isinstance(objective, LM))
FILLINGS = {
    "dense": CONFIG.ffn,
    "attribute": AttributeConfig(num_experts=3, every=1),
    "attribute, attention too": AttributeConfig(num_experts=3, every=1, attention=True),
    "mome": MoMEConfig(shared={"vision": ("image", "video")}, fusion_from=1),
    "limoe": LIMoEConfig(
        num_experts=4, every=1, router=TokenChoice(losses=NoisyRouterLossConfig(local_entropy={"text": 0.1}))
    ),
}


def state_of(chain_config: OmniVL, kind, objectives=OBJECTIVES):
    torch.manual_seed(0)
    chain = build_chain(chain_config, objectives, TOKENS)
    batch = make_batch(kind, objectives)
    return chain, State.from_batch(batch, plan_layout(objectives, kind, batch.size, batch.num_frames))


def test_an_image_alone_goes_the_way_of_the_visual_encoder():
    torch.manual_seed(0)
    unified, divided = block_of(UNIFIED), DividedBlock(CONFIG.stacks["visual"], CONFIG.patches, 0)
    for name in ("norm1", "norm2"):
        getattr(unified, name).shared.load_state_dict(getattr(divided, name).state_dict())
    unified.qkv.shared.load_state_dict(divided.attention.qkv.state_dict())
    unified.out.shared.load_state_dict(divided.attention.out.state_dict())
    unified.ffn.load_state_dict(divided.ffn.state_dict())
    x = torch.randn(3, 5, CONFIG.hidden_size, requires_grad=True)
    (mine,), sums = unified(Stream(x, (Part("image", 5),)))
    theirs = divided(x, 1, False).y
    torch.testing.assert_close(mine, theirs)
    assert sums is None
    upstream = torch.randn_like(mine)
    ours = torch.autograd.grad(mine, [x, unified.qkv.shared.weight, unified.ffn.fc1.weight], upstream)
    wanted = torch.autograd.grad(theirs, [x, divided.attention.qkv.weight, divided.ffn.fc1.weight], upstream)
    for own, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, other)


def test_dropout_takes_from_branches_in_training_alone():
    torch.manual_seed(0)
    block = UnifiedBlock(replace(UNIFIED.stacks["unified"], dropout=1.0), 0)
    stream = Stream(torch.randn(2, 5, CONFIG.hidden_size), (Part("image", 5),))
    assert torch.equal(block(stream)[0][0], stream.x)
    assert not torch.allclose(block.eval()(stream)[0][0], stream.x)


def test_streams_of_one_pass_do_not_see_each_other():
    torch.manual_seed(0)
    block = block_of(UNIFIED)
    visual, text = torch.randn(2, 5, CONFIG.hidden_size), torch.randn(3, 4, CONFIG.hidden_size)
    streams = Stream(visual, (Part("image", 5),)), Stream(text, (Part("text", 4),))
    together, _ = block(*streams)
    for made, stream in zip(together, streams, strict=True):
        torch.testing.assert_close(made, block(stream)[0][0])


def test_joined_rows_attend_across_and_padding_is_not_seen():
    torch.manual_seed(0)
    block = block_of(UNIFIED)
    x, mask = torch.randn(2, 9, CONFIG.hidden_size), torch.ones(2, 9, dtype=torch.bool)
    mask[:, 3] = False
    parts = Part("text", 4), Part("image", 5)
    (made,), _ = block(Stream(x, parts, mask))
    other = x.clone()
    other[:, 3] = torch.randn(CONFIG.hidden_size)
    (same,), _ = block(Stream(other, parts, mask))
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    torch.testing.assert_close(made[:, kept], same[:, kept])
    other = x.clone()
    other[:, 8] = torch.randn(CONFIG.hidden_size)
    (changed,), _ = block(Stream(other, parts, mask))
    assert not torch.allclose(made[:, 0], changed[:, 0])


def test_multiway_maps_each_side_by_its_own_weights():
    torch.manual_seed(0)
    module = ByModality(lambda: torch.nn.Linear(4, 4), multiway=True)
    x = torch.randn(2, 5, 4)
    stream = Stream(x, (Part("text", 2), Part("video", 3)))
    made = module(x, stream)
    torch.testing.assert_close(made[:, :2], module.sides["language"](x[:, :2]))
    torch.testing.assert_close(made[:, 2:], module.sides["vision"](x[:, 2:]))


def by_plain_attention(block, x, parts):
    """Attention of a joined row whose projections are a weighted sum of two plain ones for each kind of tokens."""

    def project(module, x):
        made, start = [], 0
        for modality, length in parts:
            piece, linear = x[:, start : start + length], module.shared
            experts, gates = linear.choose([attributes_of(modality, fused=True)])
            bank, pairs = linear.experts, (experts[0].tolist(), gates[0])
            own = [g * (piece @ bank.weight[e].t() + bank.bias[e]) for e, g in zip(*pairs, strict=True)]
            made.append(sum(own))
            start += length
        return torch.cat(made, dim=1)

    rows, length, size = x.shape
    heads, head = block.num_heads, size // block.num_heads
    q, k, v = project(block.qkv, block.norm1.shared(x)).view(rows, length, 3, heads, head).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-1, -2) / head**0.5).softmax(-1) @ v
    return x + project(block.out, mixed.transpose(1, 2).reshape(rows, length, size))


def test_attention_experts_give_the_weighted_sum_of_plain_projections_forward_and_gradient():
    torch.manual_seed(13)
    ffn = AttributeConfig(num_experts=4, top_k=2, every=1, attention=True, noise=0.0)
    block = block_of(replace(UNIFIED, ffn=ffn))
    parts = (("text", 4), ("image", 5))
    for module in (block.qkv, block.out):
        torch.nn.init.normal_(module.shared.experts.bias)
        chosen, _ = module.shared.choose([attributes_of(modality, fused=True) for modality, _ in parts])
        assert chosen.unique().numel() > 2, "both kinds go to the same experts: draw other weights"
    x = torch.randn(2, 9, CONFIG.hidden_size, requires_grad=True)
    mine = block._attend(Stream(x, tuple(Part(*part) for part in parts)))
    theirs = by_plain_attention(block, x, parts)
    torch.testing.assert_close(mine, theirs)
    upstream, weights = torch.randn_like(mine), [*block.qkv.parameters(), *block.out.parameters()]
    ours = torch.autograd.grad(mine, [x, *weights], upstream)
    wanted = torch.autograd.grad(theirs, [x, *weights], upstream)
    for own, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_attention_experts_stand_where_the_others_do():
    config = replace(UNIFIED, ffn=AttributeConfig(num_experts=3, attention=True))  # every second block
    assert [isinstance(block_of(config, index).qkv, ByAttributes) for index in (0, 1)] == [False, True]


@pytest.mark.parametrize("multiway", [False, True])
@pytest.mark.parametrize("ffn", FILLINGS.values(), ids=FILLINGS)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_parameter_learns_from_some_kind(ffn, multiway, recompute):
    config = replace(UNIFIED, ffn=ffn, multiway=multiway and not getattr(ffn, "attention", False), recompute=recompute)
    chain, _ = state_of(config, "image_text")
    for kind in PAIRED:
        _, state = state_of(config, kind)
        out = chain(state)
        assert torch.isfinite(out["loss"])
        out["loss"].backward()
        chain.after_step()
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("ffn", FILLINGS.values(), ids=FILLINGS)
@pytest.mark.parametrize("objectives", [(UniVLC(),), (MLM(),), (MRM(),), (UniVLC(), VLM()), OBJECTIVES])
@pytest.mark.parametrize("kinds", [("image_text",), ("video_text",), ("image_label", "video_text")])
def test_idle_parameters_are_those_without_a_gradient(ffn, objectives, kinds):
    config = replace(UNIFIED, ffn=ffn, multiway=not getattr(ffn, "attention", False))
    chain, _ = state_of(config, kinds[0], objectives)
    layouts = []
    for kind in kinds:
        _, state = state_of(config, kind, objectives)
        if state.layout.objectives:  # none may act on this kind: then everything is idle in it
            layouts.append(state.layout)
            chain(state)["loss"].backward()
    for layer in (layer for layer in chain.layers if isinstance(layer, UnifiedLayer | UnifiedNorm | Embed)):
        idle = set(layer.idle_parameters(layouts))
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                assert (parameter.grad is None) == (parameter in idle), name


def test_both_passes_of_a_block_are_routed_and_counted():
    config = replace(UNIFIED, ffn=FILLINGS["limoe"])
    objectives = (UniVLC(), VLM())
    chain, state = state_of(config, "image_text", objectives)
    seen = []
    for layer in chain.program:
        state = layer(state)
        if layer is chain.unified_00:
            seen.append(RouterSums.unpack(state["router/unified_00"], 3).tokens_M.tolist())
    token_ids, pairs = make_batch("image_text", objectives).token_ids, 4
    patches = 1 + (CONFIG.image_size // CONFIG.patch_size) ** 2
    words = int((token_ids != TOKENS.pad).sum())
    assert seen[0] == [pairs * patches, 0, words]
    # Three joined rows for each pair: itself, with another image, with another text. All texts are equally long.
    assert seen[1] == [seen[0][0] + 3 * pairs * patches, 0, seen[0][2] + 3 * words]


def test_what_encodes_alone_equals_the_embeddings_of_training():
    chain, state = state_of(UNIFIED, "image_text", (UniVLC(queue_size=0, batch_keys="online"),))
    chain.eval()
    wanted = state
    for layer in chain.program:
        wanted = layer(wanted)
        if layer is chain.contrast:
            break
    torch.testing.assert_close(chain.encode_visual(state["frames"]), wanted["visual_embedding"])
    torch.testing.assert_close(chain.encode_text(state["token_ids"]), wanted["text_embedding"])
    assert chain.features(state["frames"]).shape == (4, 5, CONFIG.hidden_size)


def test_matching_looks_at_text_and_image_together():
    chain, state = state_of(UNIFIED, "image_text", (UniVLC(), VLM()))
    chain.eval()
    odds = predict(chain, "vlm", state["frames"], state["token_ids"])
    turned = predict(chain, "vlm", state["frames"], state["token_ids"], torch.tensor([1, 2, 3, 0]))
    torch.testing.assert_close(turned, predict(chain, "vlm", state["frames"].roll(-1, 0), state["token_ids"]))
    assert not torch.allclose(odds, turned)


@pytest.mark.parametrize("config", [CONFIG, UNIFIED], ids=["towers", "unified"])
def test_words_can_be_restored_from_the_text_alone(config):
    objectives = (MLM(grounded=False, probability=0.5),)
    chain, state = state_of(config, "image_text", objectives)
    assert not state.layout.visual
    assert not state.layout.fused
    seen = {}
    chain.losses.register_forward_pre_hook(lambda layer, inputs: seen.update(inputs[0]))
    out = chain(state)
    targets = state["mlm/targets"]
    logits = chain.losses.vocabulary(seen["text/mlm"])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(out["loss/mlm"], wanted)
    out["loss"].backward()
    assert chain.embed.block.text.words.grad is not None
    assert all(parameter.grad is None for parameter in chain.embed.block.visual.parameters())


def test_the_giant_of_beit3_has_the_published_numbers_of_parameters():
    """692 M vision, 692 M language, 52 M fusion experts, 317 M shared attention (arXiv 2208.10442, table 2).

    Published counts are rounded; norms and scales are in none of them.
    """
    ffn = MoMEConfig(shared={"vision": ("image", "video")}, fusion_from=37)
    config = replace(Unified.presets["giant"], ffn=ffn)
    with torch.device("meta"):
        chain = build_chain(config, (), TOKENS)
    counts = dict.fromkeys(("vision", "text", "fusion", "attention"), 0)
    for name, parameter in chain.named_parameters():
        parts = name.split(".")
        if parts[0].startswith("unified_") and "experts" in parts:
            counts[parts[parts.index("experts") + 1]] += parameter.numel()
        elif parts[0].startswith("unified_") and parts[2:3] in (["qkv"], ["out"]):
            counts["attention"] += parameter.numel()
    assert {name: round(count / 1e6) for name, count in counts.items()} == {
        **{"vision": 692, "text": 692, "fusion": 52, "attention": 317}
    }


def test_captions_are_refused():
    with pytest.raises(ModelError, match="objective 'lm' asks for the stream 'generation'; architecture 'unified' has"):
        build_chain(UNIFIED, (LM(),), TOKENS)


def test_the_norms_of_a_block_add_the_plans_eps_to_the_variance():
    config = replace(UNIFIED, norm_eps=1e-5, multiway=True)
    chain = build_chain(config, (MRM(),), TOKENS)
    norms = [*chain.unified_00.block.norm1.modules(), *chain.unified_00.block.norm2.modules()]
    assert {norm.eps for norm in norms if hasattr(norm, "eps")} == {1e-5}
    assert {norm.eps for norm in chain.unified_norm.modules() if hasattr(norm, "eps")} == {1e-5}
    assert UNIFIED.norm_eps == 1e-6
