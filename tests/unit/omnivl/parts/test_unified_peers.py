"""Blocks of the unified transformer against those of BEiT-3 in torchscale, and of VLMo written out from its code."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peer_torchscale import import_torchscale
from tiny_chain import CONFIG, TOKENS
from torch import Tensor, nn

from engine.step.freeze import freeze_idle
from moe.config import LIMoEConfig, MoMEConfig
from omnivl.architectures import Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.objectives import MRM
from omnivl.parts.streams import Part, Stream
from omnivl.parts.unified import UnifiedBlock

VISION = {"vision": ("image", "video")}
BEIT3 = replace(
    Unified.like(CONFIG), multiway=True, sub_norm=True, norm_eps=1e-5, depth=4, ffn=MoMEConfig(shared=VISION)
)
VLMO = replace(Unified.like(CONFIG), norm_by_perceptron=True, depth=4, ffn=MoMEConfig(shared=VISION, fusion_from=2))
ROWS, SEEN, WORDS = 3, 5, 4
TEXT = (Part("text", WORDS),)
IMAGE = (Part("image", SEEN),)


def block_of(config: Unified, index: int = 0) -> UnifiedBlock:
    """With starting values that show every part: norms and biases are no longer those of the identity."""
    torch.manual_seed(0)
    block = UnifiedBlock(config.stacks["unified"], index, config.variant)
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return block


def stream_of(parts: tuple[Part, ...]) -> Stream:
    length = sum(part.length for part in parts)
    mask = torch.ones(ROWS, length, dtype=torch.bool)
    if parts[0].modality == "text":
        mask[1, WORDS - 1] = False
    return Stream(torch.randn(ROWS, length, CONFIG.stacks["visual"].hidden_size), parts, mask)


def torchscale_layer(config: Unified) -> nn.Module:
    """A layer of BEiT-3's encoder; side A is for images."""
    sizes = config.stacks["unified"]
    args = SimpleNamespace(
        **{"encoder_embed_dim": sizes.hidden_size, "encoder_attention_heads": sizes.num_heads, "multiway": True},
        **{"encoder_ffn_embed_dim": sizes.inner_size, "encoder_normalize_before": True, "subln": config.sub_norm},
        **{"layernorm_eps": sizes.norm_eps, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        **{"drop_path_rate": 0, "activation_fn": "gelu", "deepnorm": False, "xpos_rel_pos": False},
    )
    layer: nn.Module = import_torchscale("torchscale.architecture.encoder").EncoderLayer(args, depth=0)
    return layer


def pairs_of(block: UnifiedBlock, layer: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each of our maps and norms with torchscale's; our one map to queries, keys and values with its three."""
    attention, found = layer.self_attn, []
    for ours, theirs in (("vision", "A"), ("language", "B")):
        qkv = [getattr(one, theirs) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
        expert = block.ffn.experts["vision" if ours == "vision" else "text"]
        ffn = getattr(layer.ffn, theirs)
        found += [(block.qkv.sides[ours], qkv), (block.out.sides[ours], [getattr(attention.out_proj, theirs)])]
        found += [(expert.fc1, [ffn.fc1]), (expert.fc2, [ffn.fc2])]
        norms = [(block.norm1, layer.self_attn_layer_norm), (block.norm2, layer.final_layer_norm)]
        if block.out_norm is not None:
            norms.append((block.out_norm, attention.inner_attn_ln))
            found.append((expert.norm, [ffn.ffn_layernorm]))
        found += [(mine.sides[ours], [getattr(its, theirs)]) for mine, its in norms]
    return found


@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("parts", [TEXT, IMAGE, TEXT + IMAGE], ids=["text", "image", "joined"])
def test_a_block_of_beit3_is_torchscales(parts: tuple[Part, ...], sub_norm: bool) -> None:
    """Values and gradients of inputs and of every parameter; torchscale has images before texts."""
    config = replace(BEIT3, sub_norm=sub_norm)
    layer, block, stream = torchscale_layer(config), block_of(config), stream_of(parts)
    pairs = pairs_of(block, layer)
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in layer.parameters())
    for mine, its in pairs:
        for kind in ("weight", "bias"):
            for one, value in zip(its, getattr(mine, kind).data.chunk(len(its)), strict=True):
                getattr(one, kind).data = value.clone()
    assert stream.mask is not None
    turn = torch.cat([torch.arange(WORDS, stream.x.shape[1]), torch.arange(WORDS)]) if stream.fused else slice(None)
    split = {"text": 0, "image": -1}[parts[0].modality] if not stream.fused else SEEN
    x, its_x = (stream.x.clone().requires_grad_() for _ in range(2))
    (made,), _ = block(replace(stream, x=x))
    # Padded positions are no keys; as queries they are computed by both and read by neither.
    expected, _ = layer(its_x[:, turn], ~stream.mask[:, turn], multiway_split_position=split)
    read = torch.randn_like(made) * stream.mask[..., None]
    torch.testing.assert_close(made[:, turn] * read[:, turn], expected * read[:, turn], rtol=1e-5, atol=1e-5)
    (made * read).sum().backward()
    (expected * read[:, turn]).sum().backward()
    torch.testing.assert_close(x.grad, its_x.grad, rtol=1e-4, atol=1e-5)
    for mine, its in pairs:
        for kind in ("weight", "bias"):
            ours, theirs = getattr(mine, kind).grad, [getattr(one, kind).grad for one in its]
            assert (ours is None) == (theirs[0] is None), "of a side that no token has"
            if ours is not None:
                torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-4)


def vlmo_block(block: UnifiedBlock, x: Tensor, mask: Tensor, names: list[str], lengths: list[int]) -> Tensor:
    """A block of VLMo as its code has it: one first norm, then norm and perceptron of each modality."""
    rows, positions, size = x.shape
    heads = block.num_heads
    normed = F.layer_norm(x, (size,), block.norm1.shared.weight, block.norm1.shared.bias, 1e-6)
    qkv = F.linear(normed, block.qkv.shared.weight, block.qkv.shared.bias)
    q, k, v = qkv.view(rows, positions, 3, heads, size // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * (size // heads) ** -0.5).masked_fill(~mask[:, None, None], -torch.inf)
    seen = (weights.softmax(-1) @ v).transpose(1, 2).reshape(rows, positions, size)
    x = x + F.linear(seen, block.out.shared.weight, block.out.shared.bias)
    pieces = []
    for name, piece in zip(names, x.split(lengths, dim=1), strict=True):
        norm, perceptron = block.norm2.perceptrons[name], block.ffn.experts[name]
        inner = F.gelu(perceptron.fc1(F.layer_norm(piece, (size,), norm.weight, norm.bias, 1e-6)))
        pieces.append(piece + perceptron.fc2(inner))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(
    ("index", "parts", "names"),
    [
        (0, IMAGE, ["vision"]),
        (2, TEXT, ["text"]),
        (0, TEXT + IMAGE, ["text", "vision"]),
        (2, TEXT + IMAGE, ["fusion", "fusion"]),
    ],
)
def test_a_block_of_vlmo_has_a_norm_for_each_perceptron(index: int, parts: tuple[Part, ...], names: list[str]) -> None:
    block, stream = block_of(VLMO, index), stream_of(parts)
    assert stream.mask is not None
    (made,), _ = block(stream)
    expected = vlmo_block(block, stream.x, stream.mask, names, [part.length for part in parts])
    torch.testing.assert_close(made[stream.mask], expected[stream.mask], rtol=1e-5, atol=1e-5)
    made[stream.mask].sum().backward()
    used = {name.split(".")[2] for name, p in block.named_parameters() if "perceptrons" in name and p.grad is not None}
    assert used == set(names)


def test_norms_of_perceptrons_that_no_step_uses_are_frozen() -> None:
    objectives = (MRM(),)
    chain = build_chain(VLMO, objectives, TOKENS)
    freeze_idle(chain, [plan_layout(objectives, "image", 2, 1)])
    trained = {n.split(".")[4] for n, p in chain.named_parameters() if ".norm2.perceptrons." in n and p.requires_grad}
    assert trained == {"vision"}


def test_starting_values_with_the_further_norms_are_larger() -> None:
    """``sqrt(log 8)`` for four blocks, in values, output projections and perceptrons."""
    blocks = []
    for sub_norm in (False, True):
        torch.manual_seed(3)
        blocks.append(UnifiedBlock(BEIT3.stacks["unified"], 0, replace(BEIT3, sub_norm=sub_norm).variant).state_dict())
    plain, raised = blocks
    size = BEIT3.hidden_size
    for name, before in plain.items():
        gain = torch.ones_like(before)
        if name.startswith("qkv") and name.endswith("weight"):
            gain[2 * size :] = 2.0794415**0.5
        elif name.startswith(("out.", "ffn.")) and name.endswith("weight"):
            gain[:] = 2.0794415**0.5
        torch.testing.assert_close(raised[name], before * gain, msg=name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(BEIT3, ffn=LIMoEConfig()), "true with ffn kind 'limoe'"),
        (replace(VLMO, ffn=CONFIG.ffn), "true with ffn kind 'dense'"),
        (replace(VLMO, multiway=True), "true beside multiway"),
    ],
)
def test_norms_that_do_not_fit(config: Unified, said: str) -> None:
    assert said in [misfit.got for misfit in config.misfits()]
