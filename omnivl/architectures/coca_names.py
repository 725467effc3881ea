"""Weights of open_clip's ``CoCa`` under our names.

Shapes: D width of the encoder, P width of what poolers gather, L text positions.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures.foreign import CLIP_PIXELS, OUR_PIXELS, Pixels, fold_pixels, read_json
from omnivl.errors import ModelError
from omnivl.parts.sizes import Transformer

TELLING = {"text.cls_emb", "visual.attn_pool.query", "text_decoder.text_projection"}
"""Names that the weights of every ``CoCa`` have."""

_TABLES = {
    "embed.block.visual.class_token": "visual.class_embedding",
    "embed.block.visual.positions": "visual.positional_embedding",
    "embed.block.visual.patches.weight": "visual.conv1.weight",
    "embed.block.text.words": "text.token_embedding.weight",
    "embed.block.text.positions": "text.positional_embedding",
    "embed.block.text.closing": "text.cls_emb",
    "contrast.visual_projection.weight": "visual.proj",
    "contrast.text_projection.weight": "text.text_projection",
    "contrast.logit_scale": "logit_scale",
    "losses.vocabulary.decoder.weight": "text_decoder.text_projection",
}
_TRANSPOSED = (
    "contrast.visual_projection.weight",
    "contrast.text_projection.weight",
    "losses.vocabulary.decoder.weight",
)
_NORMS = {
    "embed.block.visual.norm": "visual.ln_pre",
    "visual_pool.block.norm": "visual.ln_post",
    "text_norm.block": "text.ln_final",
}
_BLOCK = {
    "norm1": "ln_1",
    "attention.out": "attn.out_proj",
    "norm2": "ln_2",
    "ffn.fc1": "mlp.c_fc",
    "ffn.fc2": "mlp.c_proj",
}
_OWN = {"norm1": "ln_1", "attention.out": "attn.out_proj", "norm_own": "ln_2"}
_OWN |= {"ffn_own.fc1": "mlp.c_fc", "ffn_own.fc2": "mlp.c_proj"}
"""Of a block with self-attention that stands before one with cross-attention."""
_CROSS = {"norm2": "ln_1", "norm_memory": "ln_1_kv", "cross.out": "attn.out_proj", "norm3": "ln_2"}
_CROSS |= {"ffn.fc1": "mlp.c_fc", "ffn.fc2": "mlp.c_proj"}
_POOLERS = {"captions": "visual.attn_pool", "contrast": "visual.attn_pool_contrastive"}
_POOLER = {"norm_queries": "ln_q", "norm_memory": "ln_k", "attention.out": "attn.out_proj"}
_PATCHES, _POSITIONS = "embed.block.visual.patches.weight", "embed.block.visual.positions"
_CONFIG = "open_clip_config.json"

Depths = tuple[int, int, int]
"""Blocks of the image encoder, of the lower half and of the upper half."""


def _whole(depths: Depths) -> Iterator[tuple[str, str]]:
    """Each tensor of ours that is one of theirs as a whole, with its name there."""
    yield from _TABLES.items()
    vision, text, multimodal = depths
    maps = {**_NORMS, f"generation_{multimodal - 1:02d}.block.norm_out": "text_decoder.ln_final"}
    for stack, tower, depth in (("visual", "visual", vision), ("text", "text", text)):
        for index in range(depth):
            theirs = f"{tower}.transformer.resblocks.{index}"
            maps |= {f"{stack}_{index:02d}.block.{own}": f"{theirs}.{other}" for own, other in _BLOCK.items()}
            yield from _packed(f"{stack}_{index:02d}.block.attention.qkv", f"{theirs}.attn")
    for index in range(multimodal):
        ours, theirs = f"generation_{index:02d}.block", f"text_decoder.resblocks.{index}"
        maps |= {f"{ours}.{own}": f"{theirs}.{other}" for own, other in _OWN.items()}
        yield from _packed(f"{ours}.attention.qkv", f"{theirs}.attn")
        maps |= {f"{ours}.{own}": f"text_decoder.cross_attn.{index}.{other}" for own, other in _CROSS.items()}
    for own, other in _POOLERS.items():
        yield f"visual_pool.block.{own}.queries", f"{other}.query"
        maps |= {f"visual_pool.block.{own}.{part}": f"{other}.{name}" for part, name in _POOLER.items()}
    for ours, theirs in maps.items():
        for ending in ("weight", "bias"):
            yield f"{ours}.{ending}", f"{theirs}.{ending}"


def _packed(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for ending in ("weight", "bias"):
        yield f"{ours}.{ending}", f"{theirs}.in_proj_{ending}"


def _attentions(multimodal: int) -> Iterator[tuple[str, str]]:
    """The cross-attentions, whose queries are apart from keys and values: ours and theirs."""
    for own, other in _POOLERS.items():
        yield f"visual_pool.block.{own}.attention", f"{other}.attn"
    for index in range(multimodal):
        yield f"generation_{index:02d}.block.cross", f"text_decoder.cross_attn.{index}.attn"


def from_open_clip(
    weights: Mapping[str, Tensor],
    path: Path,
    vision: Transformer,
    text: Transformer,
    multimodal: Transformer,
    options: Mapping[str, Any],
) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    A different normalisation of pixels is folded into the patch embedding and, since that has no bias, into the
    positions of all patches.

    Args:
        weights: By the class's names.
        path: The folder or file, beside which ``open_clip_config.json`` may stand.
        vision: Our image encoder.
        text: Our lower half.
        multimodal: Our upper half.
        options: ``pooling``, ``pooler_heads``, ``alternates`` and ``closing`` of ours.

    Returns:
        None if the weights are of another class.

    Raises:
        ModelError: Options of ours compute something else.
    """
    if not weights.keys() >= TELLING:
        return None
    said = read_json((path if path.is_dir() else path.parent) / _CONFIG)
    if unmet := list(_unmet(weights, said.get("model_cfg", {}), vision, text, multimodal, options)):
        raise ModelError("\n".join(f"{path}: {line}; set it, or give other weights" for line in unmet))
    depths = (
        _depth(weights, "visual.transformer."),
        _depth(weights, "text.transformer."),
        _depth(weights, "text_decoder."),
    )
    found, taken = dict[str, Tensor](), set[str]()
    for ours, theirs in _whole(depths):
        if theirs in weights:
            found[ours] = weights[theirs]
            taken.add(theirs)
    for ours, theirs in _attentions(depths[2]):
        found |= _attention(weights, ours, theirs, taken)
    for name in _TRANSPOSED:
        found[name] = found[name].t()
    found["contrast.logit_scale"] = found["contrast.logit_scale"].reshape(1)
    found["embed.block.text.closing"] = found["embed.block.text.closing"] + found["embed.block.text.positions"][-1]
    found["embed.block.text.positions"] = found["embed.block.text.positions"][:-1]
    found[_PATCHES] = found[_PATCHES].flatten(1)
    pixels = _pixels(said.get("preprocess_cfg", {}))
    if pixels != OUR_PIXELS:
        found[_PATCHES], shift = fold_pixels(found[_PATCHES], found[_PATCHES].new_zeros(len(found[_PATCHES])), pixels)
        found[_POSITIONS] = torch.cat([found[_POSITIONS][:1], found[_POSITIONS][1:] + shift])
    return found | {name: tensor for name, tensor in weights.items() if name not in taken}


def _attention(weights: Mapping[str, Tensor], ours: str, theirs: str, taken: set[str]) -> dict[str, Tensor]:
    """The maps to queries, and to keys and values, of a cross-attention; adds the names there to ``taken``."""
    if f"{theirs}.in_proj_bias" not in weights:
        return {}
    bias = weights[f"{theirs}.in_proj_bias"]
    apart = [f"{theirs}.{part}_proj_weight" for part in ("q", "k", "v")]
    size = len(bias) // 3
    if apart[0] in weights:  # what is looked at has another width
        query, keys = weights[apart[0]], torch.cat([weights[name] for name in apart[1:]])
    else:
        apart = [f"{theirs}.in_proj_weight"]
        query, keys = weights[apart[0]][:size], weights[apart[0]][size:]
    taken.update((f"{theirs}.in_proj_bias", *apart))
    made = {"q.weight": query, "q.bias": bias[:size], "kv.weight": keys, "kv.bias": bias[size:]}
    return {f"{ours}.{name}": tensor for name, tensor in made.items()}


def _depth(weights: Mapping[str, Tensor], start: str) -> int:
    """Number of blocks of a tower."""
    start += "resblocks."
    return 1 + max(int(name.removeprefix(start).partition(".")[0]) for name in weights if name.startswith(start))


def _pixels(said: Mapping[str, Any]) -> Pixels:
    """How the checkpoint's pixels are normalised; open_clip's models without a word as CLIP's."""
    return Pixels(tuple(said.get("mean", CLIP_PIXELS.mean)), tuple(said.get("std", CLIP_PIXELS.std)))


def _unmet(
    weights: Mapping[str, Tensor],
    said: Mapping[str, Any],
    vision: Transformer,
    text: Transformer,
    multimodal: Transformer,
    options: Mapping[str, Any],
) -> Iterator[str]:
    """Options that the weights need and shapes do not show, as unfinished messages."""
    two = "visual.attn_pool_contrastive.query" in weights
    yield from _differing("pooling", options["pooling"], ("cascade", "parallel") if two else ("joint",))
    yield from _differing("alternates", options["alternates"], (True,))
    if not said:
        return
    tower, words, upper = (said.get(f"{name}_cfg", {}) for name in ("vision", "text", "multimodal"))
    if two and isinstance(tower.get("attentional_pool"), str):
        yield from _differing("pooling", options["pooling"], (tower["attentional_pool"],))
    closing = "own" if words.get("correct_cls_mask", False) else "released"
    yield from _differing("closing", options["closing"], (closing,))
    yield from _differing("pooler_heads", options["pooler_heads"], (tower.get("attn_pooler_heads", 8),))
    heads = tower.get("width", 768) // tower.get("head_width", 64), words.get("heads", 8), upper.get("heads", 8)
    activation = "quick_gelu" if said.get("quick_gelu", False) else "gelu"
    for name, own, count in zip(("vision", "text", "multimodal"), (vision, text, multimodal), heads, strict=True):
        yield from _differing(f"{name}.num_heads", own.num_heads, (count,))
        yield from _differing(f"{name}.activation", own.activation, (activation,))
        yield from _differing(f"{name}.norm_eps", own.norm_eps, (1e-5,))


def _differing(name: str, own: object, allowed: tuple[object, ...]) -> Iterator[str]:
    if own not in allowed:
        yield f"model.{name}: got {own!r}; allowed {' or '.join(map(repr, allowed))} with these weights"
