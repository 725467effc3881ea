"""Which maps get adapters, what is trained then, and that no computation of a model leaves them out."""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import small_blip2
import small_coca
import small_flamingo
import small_git
import small_pali
import small_simvlm
import torch
from tiny_chain import CONFIG, EVERYTHING, TOKENS, make_batch

from engine.disk.merging import merged
from engine.hosts.plain import PlainHost
from engine.step.adapters import LoraConfig, adapt, adapted_shapes, frozen_at_random, maps_of
from engine.step.freeze import freeze, freeze_idle, store_frozen
from engine.step.optimizer import OptimizerConfig, parameter_groups
from moe.config import AttributeConfig, LIMoEConfig, MoMEConfig
from moe.linear import ROLES, Adapter, Linear
from omnivl.architectures import ArchitectureConfig, Unified
from omnivl.architectures.base import Architecture
from omnivl.architectures.build import build_chain, outline
from omnivl.chain.chain import Chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Objective
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch
from omnivl.objectives import LM, MLM, VLM, UniVLC

EVERYWHERE = LoraConfig(rank=2, alpha=4.0, on=ROLES)
WITHOUT_WRITING = tuple(one for one in EVERYTHING if not isinstance(one, LM))
STILLS = plan_layout(EVERYTHING, "image_text", 4, 1)
ARCHITECTURES = [one() for one in get_args(get_args(ArchitectureConfig)[0])]
CLIPS = plan_layout(EVERYTHING, "video_text", 4, CONFIG.num_frames)


def adapted_chain(lora: LoraConfig, layouts: list[StepLayout], frozen: tuple[str, ...] = ()) -> Chain:
    torch.manual_seed(0)
    chain = build_chain(CONFIG, EVERYTHING, TOKENS)
    adapt(chain, lora, layouts=layouts, frozen=frozen)
    freeze(chain, frozen, "freeze")
    freeze_idle(chain, layouts)
    return chain


def adapters_of(chain: Chain) -> set[str]:
    return {name.removesuffix(".adapter") for name, module in chain.named_modules() if isinstance(module, Adapter)}


def test_adapters_and_heads_are_trained_and_nothing_else() -> None:
    chain = adapted_chain(EVERYWHERE, [STILLS, CLIPS])
    trained = {name for name, parameter in chain.named_parameters() if parameter.requires_grad}
    adapters = {f"{name}.adapter.{part}" for name in adapters_of(chain) for part in ("down", "up")}
    heads = {name for name, _ in chain.named_parameters() if name.startswith("losses.") and "momentum_" not in name}
    assert trained == {name for name in adapters if "momentum_" not in name} | heads
    block = "visual_00.block"
    assert {name for name in adapters_of(chain) if name.startswith(f"{block}.")} == {
        *(f"{block}.{one}" for one in ("attention.qkv", "attention.out", "ffn.fc1", "ffn.fc2")),
        *(f"{block}.temporal.{one}" for one in ("attention.qkv", "attention.out", "temporal_fc")),
    }
    cross = {name for name in adapters_of(chain) if ".cross." in name}
    assert {name.rpartition(".")[2] for name in cross} == {"q", "kv", "out"}
    groups = parameter_groups(chain, OptimizerConfig(lr_scales={"*.adapter.up": 16}))
    assert {name for group in groups if group.lr_scale == 16 for name in group.names} == {
        name for name in trained if name.endswith(".adapter.up")
    }
    assert all(group.weight_decay > 0 for group in groups if group.lr_scale == 16), "they are matrices"


def test_roles_choose() -> None:
    names = {
        role: {
            name.rpartition("block.")[2]
            for name in adapters_of(adapted_chain(replace(EVERYWHERE, on=(role,)), [CLIPS]))
        }
        for role in ROLES
    }
    assert names["attention"] == {
        *("attention.qkv", "attention.out", "temporal.attention.qkv", "temporal.attention.out", "temporal.temporal_fc"),
    }
    assert names["cross_attention"] == {"cross.q", "cross.kv", "cross.out"}
    assert names["feed_forward"] == {"ffn.fc1", "ffn.fc2"}
    shapes = adapted_shapes(adapted_chain(EVERYWHERE, [STILLS]))
    assert set(shapes["attention"]) == {(16, 16)}, "of queries, keys and values each"
    assert set(shapes["feed_forward"]) == {(64, 16), (16, 64)}


def test_what_is_frozen_or_idle_gets_none() -> None:
    frozen = ("text_*", "visual_00.block.ffn", "losses.heads.mrm")
    chain = adapted_chain(EVERYWHERE, [STILLS], frozen)
    names = adapters_of(chain)
    assert not [name for name in names if ".temporal." in name], "no clips"
    assert not [name for name in names if name.startswith("text_")], "their twins have none either"
    assert "visual_00.block.ffn.fc1" not in names and "visual_01.block.ffn.fc1" in names
    assert "visual_00.momentum_block.ffn.fc1" not in names and "visual_01.momentum_block.ffn.fc1" in names
    assert not any(one.requires_grad for one in chain.losses.heads.mrm.parameters())
    only_words = plan_layout([MLM(grounded=False)], "image_text", 4, 1)
    assert {name.split("_")[0] for name in adapters_of(adapted_chain(EVERYWHERE, [only_words]))} == {"text"}


def run(chain: Chain, batch: Batch, objectives: tuple[Objective, ...]) -> dict[str, Any]:
    layout = plan_layout(objectives, batch.kind, len(batch.token_ids), batch.num_frames)
    torch.manual_seed(1)
    state = chain(State.from_batch(batch, layout))
    return {name: value for name, value in state.items() if name.startswith("loss")}


def moved(chain: Chain) -> None:
    """Gives every adapter something to add, other ones in twins."""
    draw = torch.Generator().manual_seed(2)
    for module in chain.modules():
        if isinstance(module, Adapter):
            module.up.data.copy_(0.3 * torch.randn(module.up.shape, generator=draw))


OF_PICTURES = (make_batch, EVERYTHING, ("image_text", "video_text"))
OF_ONE = (make_batch, WITHOUT_WRITING, ("image_text", "video_text"))
OF_QUERIES = (
    lambda kind, objectives: small_blip2.make_batch(objectives, frames=1 if kind == "image_text" else 2),
    small_blip2.STAGE_1,
    ("image_text", "video_text"),
)
OF_COCA = (
    lambda kind, objectives: small_coca.coca_batch(objectives, kind),
    small_coca.OBJECTIVES,
    ("image_text", "video_text"),
)


def with_words(config: Any) -> Any:
    """The same with a row for each word of the tokenizer."""
    return replace(config, language=replace(config.language, vocab_size=TOKENS.vocab_size))


MODELS: dict[str, tuple[Architecture, Any]] = {
    "omnivl": (CONFIG, OF_PICTURES),
    "omnivl, experts by modality": (replace(CONFIG, ffn=MoMEConfig(fusion_from=0)), OF_PICTURES),
    "omnivl, sparse experts and a shared one": (
        replace(CONFIG, ffn=LIMoEConfig(num_experts=4, every=2, shared_experts=1)),
        OF_PICTURES,
    ),
    "unified": (Unified.like(CONFIG), OF_ONE),
    "unified by modality": (replace(Unified.like(CONFIG), multiway=True), OF_ONE),
    "unified by attributes": (
        replace(Unified.like(CONFIG), ffn=AttributeConfig(num_experts=4, every=2, noise=0.0)),
        OF_ONE,
    ),
    "blip2": (small_blip2.SMALL, OF_QUERIES),
    "coca": (small_coca.SMALL, OF_COCA),
    "coca as released": (small_coca.RELEASED, OF_COCA),
    "git": (
        small_git.SMALL,
        (lambda kind, objectives: small_git.git_batch(kind), small_git.OBJECTIVES, ("image_text", "video_text")),
    ),
    "flamingo": (
        with_words(small_flamingo.FLAMINGO),
        (lambda kind, objectives: small_flamingo.document_batch(), (small_flamingo.INTERLEAVED,), ("images_text",)),
    ),
    "frozen": (
        with_words(small_flamingo.FROZEN),
        (lambda kind, objectives: small_flamingo.caption_batch(), (small_flamingo.PREFIX,), ("image_text",)),
    ),
    "pali": (
        small_pali.SMALL,
        (lambda kind, objectives: small_pali.pali_batch(), small_pali.OBJECTIVES, ("image_text",)),
    ),
    "simvlm": (
        small_simvlm.SMALL,
        (lambda kind, objectives: small_simvlm.simvlm_batch(), small_simvlm.OBJECTIVES, ("image_text",)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_adapters_equals_the_merged_one(name: str) -> None:
    """Losses of all objectives and embeddings, with twins; whatever read a weight past its adapter would differ."""
    config, (batch_of, objectives, kinds) = MODELS[name]
    torch.manual_seed(0)
    chain = build_chain(config, objectives, TOKENS)
    plain = build_chain(config, objectives, TOKENS)
    plain.load_state_dict(chain.state_dict())
    batches = [batch_of(kind, objectives) for kind in kinds]
    layouts = [plan_layout(objectives, one.kind, len(one.token_ids), one.num_frames) for one in batches]
    adapt(chain, EVERYWHERE, layouts=layouts)
    for batch in batches:
        assert run(chain, batch, objectives) == run(plain, batch, objectives), "new adapters add nothing"
    moved(chain)
    before = run(plain, batches[0], objectives)
    weights = chain.state_dict()
    plain.load_state_dict(dict(merged(weights.items(), weights)))  # strict: all names, and no adapter's
    for batch in batches:
        got, wanted = run(chain, batch, objectives), run(plain, batch, objectives)
        for loss, value in wanted.items():
            torch.testing.assert_close(got[loss], value, rtol=2e-4, atol=2e-5, msg=lambda text, loss=loss: loss + text)
    assert abs(before["loss"] - run(plain, batches[0], objectives)["loss"]) > 1e-3, "adapters change the losses"
    for one in (chain, plain):
        one.eval()
    with torch.no_grad():
        for batch in batches if "embedding" in config.offers else ():
            near = {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(chain.encode_visual(batch.frames), plain.encode_visual(batch.frames), **near)
            torch.testing.assert_close(chain.encode_text(batch.token_ids), plain.encode_text(batch.token_ids), **near)


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda one: one.kind)
def test_every_map_of_a_block_has_a_role(config: Architecture) -> None:
    count = 0
    for layer in outline(config).layers:
        known = {id(one) for _, one in maps_of(layer).values()}
        if (layer.level is None or layer.level < 0) and layer.stack != "resampler":  # whose blocks are one layer
            assert not known, layer.stack
            continue
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                count += 1
                assert id(module) in known, f"{layer.stack}: {name}"
    assert count > 0


def test_the_twin_follows_the_adapter_and_drops_nothing() -> None:
    chain = adapted_chain(replace(EVERYWHERE, dropout=0.5), [STILLS])
    layer = chain.visual_00
    online, twin = (block.attention.qkv.adapter for block in (layer.block, layer.momentum_block))
    assert (online.dropout, twin.dropout) == (0.5, 0.0)
    assert not any(one.requires_grad for one in twin.parameters())
    assert torch.equal(online.down, twin.down), "it starts equal"
    start, decay = twin.down.detach().clone(), layer.momentum.decay
    with torch.no_grad():
        online.up.add_(1.0)
        online.down.add_(2.0)
    layer.after_step()
    torch.testing.assert_close(twin.up, torch.full_like(twin.up, 1 - decay))
    torch.testing.assert_close(twin.down, start + 2 * (1 - decay))
    assert twin.scale == online.scale


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_leaves_what_is_beside_adapters_as_it_was(kind: Any) -> None:
    objectives = (UniVLC(queue_size=16), VLM())
    torch.manual_seed(0)
    chain = build_chain(CONFIG, objectives, TOKENS)
    layouts = [plan_layout(objectives, "image_text", 4, 1)]
    adapt(chain, replace(EVERYWHERE, dropout=0.1), layouts=layouts)
    freeze_idle(chain, layouts)
    before = {name: parameter.detach().clone() for name, parameter in chain.named_parameters()}
    optimizer = OptimizerConfig(kind=kind, lr=1e-2, schedule="constant")
    host = PlainHost(chain.train(), optimizer, partial(plan_layout, objectives), total_steps=3)
    for step in range(3):
        host.step([make_batch("image_text", objectives)], step)
    for name, parameter in chain.named_parameters():
        learns = (".adapter." in name or name.startswith("losses.")) and "generation" not in name
        assert torch.equal(parameter, before[name]) != learns, name


def test_what_nothing_was_loaded_into_is_told() -> None:
    chain = adapted_chain(EVERYWHERE, [STILLS])
    every = [name for name, _ in chain.named_parameters()]
    assert frozen_at_random(chain, [STILLS], every) == {}
    known = [name for name in every if not name.startswith("alignment_00.block.norm1")]
    assert frozen_at_random(chain, [STILLS], known) == {"alignment": 32}, "a weight and a bias of 16"
    clips = [name for name in every if ".temporal." not in name]
    assert frozen_at_random(chain, [STILLS], clips) == {}, "what no step uses does not matter"


def test_adapters_beside_weights_of_two_bytes_are_fp32() -> None:
    config = replace(small_blip2.SMALL, vision=replace(small_blip2.SMALL.vision, frozen_dtype="bf16"))
    torch.manual_seed(0)
    chain = build_chain(config, small_blip2.STAGE_1, TOKENS)
    batch = small_blip2.make_batch()
    layouts = [plan_layout(small_blip2.STAGE_1, "image_text", 4, 1)]
    adapt(chain, EVERYWHERE, layouts=layouts)
    freeze_idle(chain, layouts)
    store_frozen(chain, config.stacks)
    qkv = chain.visual_00.block.attention.qkv
    assert (qkv.weight.dtype, qkv.adapter.down.dtype, qkv.adapter.up.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    run(chain, batch, small_blip2.STAGE_1)["loss"].backward()
    assert qkv.weight.grad is None
    assert qkv.adapter.up.grad.dtype == torch.float32 and qkv.adapter.up.grad.any()
