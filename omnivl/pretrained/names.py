"""Translates names of Hugging Face parameters to ours.

Shapes: D hidden size, P projection size.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Architecture = Literal["vit", "timesformer", "beit", "bert", "clip", "blip"]
Stack = Literal["text", "alignment", "generation"]

TOKEN_TYPES = "token_type_embeddings.weight"
_PREFIX = re.compile(r"^(?:vit|bert|timesformer|beit|model)\.")
_LAYER = r"(?:encoder\.layer|encoder\.layers|layers)\.(?P<layer>\d+)\."
_ENDING = r"\.(?P<ending>weight|bias)"

_SHARED = "visual_*.block.relative.bias"
# Both the names in memory of transformers 5 and those of its files, and of earlier versions, are translated.
_VIT = {
    r"embeddings\.cls_token": "embed.block.visual.class_token",
    r"embeddings\.mask_token": "embed.block.visual.mask_token",
    r"embeddings\.position_embeddings": "embed.block.visual.positions",
    r"embeddings\.time_embeddings": "embed.block.visual.times",
    r"embeddings\.patch_embeddings\.projection" + _ENDING: "embed.block.visual.patches",
    r"layernorm" + _ENDING: "visual_norm.block",
    r"(?:encoder\.relative_position_bias|shared_position_bias)\.relative_position_bias_table": _SHARED,
    _LAYER + r"(?:attention\.attention\.)?relative_position_bias\.relative_position_bias_table": "relative.bias",
    _LAYER + r"lambda_1": "scale1.weight",
    _LAYER + r"lambda_2": "scale2.weight",
    _LAYER + r"layernorm_before" + _ENDING: "norm1",
    _LAYER + r"layernorm_after" + _ENDING: "norm2",
    _LAYER + r"attention\.attention\.qkv" + _ENDING: "attention.qkv",
    _LAYER + r"attention\.(?:attention\.)?(?P<slot>query|key|value|q_proj|k_proj|v_proj)" + _ENDING: "attention.qkv",
    _LAYER + r"attention\.(?:output\.dense|o_proj)" + _ENDING: "attention.out",
    _LAYER + r"(?:intermediate\.dense|mlp\.fc1)" + _ENDING: "ffn.fc1",
    _LAYER + r"(?:output\.dense|mlp\.fc2)" + _ENDING: "ffn.fc2",
    _LAYER + r"temporal_layernorm" + _ENDING: "temporal.norm",
    _LAYER + r"temporal_attention\.attention\.qkv" + _ENDING: "temporal.attention.qkv",
    _LAYER + r"temporal_attention\.output\.dense" + _ENDING: "temporal.attention.out",
    _LAYER + r"temporal_dense" + _ENDING: "temporal.temporal_fc",
}
_CLIP = {
    r"embeddings\.class_embedding": "embed.block.visual.class_token",
    r"embeddings\.position_embedding(?:\.weight)?": "embed.block.visual.positions",
    r"embeddings\.patch_embedding" + _ENDING: "embed.block.visual.patches",
    r"pre_layrnorm" + _ENDING: "embed.block.visual.norm",
    r"post_layernorm" + _ENDING: "visual_norm.block",
    _LAYER + r"layer_norm1" + _ENDING: "norm1",
    _LAYER + r"layer_norm2" + _ENDING: "norm2",
    _LAYER + r"self_attn\.qkv" + _ENDING: "attention.qkv",
    _LAYER + r"self_attn\.(?P<slot>q_proj|k_proj|v_proj)" + _ENDING: "attention.qkv",
    _LAYER + r"self_attn\.(?:out_proj|projection)" + _ENDING: "attention.out",
    _LAYER + r"mlp\.fc1" + _ENDING: "ffn.fc1",
    _LAYER + r"mlp\.fc2" + _ENDING: "ffn.fc2",
}
_BERT = {
    r"embeddings\.word_embeddings\.weight": "embed.block.text.words",
    r"embeddings\.position_embeddings\.weight": "embed.block.text.positions",
    r"embeddings\.LayerNorm" + _ENDING: "embed.block.text.norm",
    _LAYER + r"attention\.self\.(?P<slot>query|key|value)" + _ENDING: "attention.qkv",
    _LAYER + r"attention\.output\.dense" + _ENDING: "attention.out",
    _LAYER + r"attention\.output\.LayerNorm" + _ENDING: "norm1",
    _LAYER + r"crossattention\.self\.query" + _ENDING: "cross.q",
    _LAYER + r"crossattention\.self\.(?P<slot>key|value)" + _ENDING: "cross.kv",
    _LAYER + r"crossattention\.output\.dense" + _ENDING: "cross.out",
    _LAYER + r"crossattention\.output\.LayerNorm" + _ENDING: "norm2",
    _LAYER + r"intermediate\.dense" + _ENDING: "ffn.fc1",
    _LAYER + r"output\.dense" + _ENDING: "ffn.fc2",
    _LAYER + r"output\.LayerNorm" + _ENDING: "norm3",
}
_HEADS = {
    r"visual_projection\.weight": "contrast.visual_projection.weight",  # CLIP, without a bias
    r"vision_proj" + _ENDING: "contrast.visual_projection",  # BLIP
    r"text_proj" + _ENDING: "contrast.text_projection",
    r"itm_head" + _ENDING: "losses.heads.vlm.output",
    r"text_decoder\.cls\.predictions\.transform\.dense" + _ENDING: "losses.vocabulary.transform",
    r"text_decoder\.cls\.predictions\.transform\.LayerNorm" + _ENDING: "losses.vocabulary.norm",
    r"text_decoder\.cls\.predictions\.decoder\.weight": "losses.vocabulary.decoder.weight",
    r"text_decoder\.cls\.predictions\.bias": "losses.vocabulary.decoder.bias",
}
_SLOTS = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}
_DECODER_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Translation:
    """A checkpoint's tensors under our names.

    Attributes:
        tensors: Values by our names, in our shapes, except for tables of another length.
        sources: The checkpoint's names from which each was made.
        unused: The checkpoint's names that have no counterpart.
        zeros: Our parameters that are added to something and that the architecture does not have; they are set to zero.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)


def detect(weights: Mapping[str, Tensor]) -> Architecture | None:
    """The architecture of a checkpoint, from its names; None if it is not supported."""
    names = " ".join(weights)
    if "temporal_attention." in names:
        return "timesformer"
    if "embeddings.class_embedding" in names or "text_decoder.bert." in names:
        is_blip = any(part in names for part in ("self_attn.qkv", "text_encoder.", "text_decoder."))
        return "blip" if is_blip else "clip"
    if "embeddings.word_embeddings" in names:
        return "bert"
    if "embeddings.patch_embeddings.projection" not in names:
        return None
    return "beit" if "lambda_1" in names or "relative_position_bias" in names else "vit"


def translate(weights: Mapping[str, Tensor], architecture: Architecture, stacks: Sequence[Stack]) -> Translation:
    """Renames and joins a checkpoint's tensors.

    Args:
        weights: Values, or gradients, by the checkpoint's names.
        architecture: Of the checkpoint.
        stacks: Stacks that a BERT's blocks go into.
    """
    result = Translation()
    joined: dict[str, dict[int, Tensor]] = {}
    depth = 1 + max((int(match["layer"]) for name in weights if (match := re.search(_LAYER, name))), default=-1)
    for name, tensor in weights.items():
        plain = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        places = _places(plain, architecture, stacks, depth)
        if not places or _stands_twice(name, weights):
            result.unused.append(name)
            continue
        for target, slot in places:
            result.sources.setdefault(target, []).append(name)
            if slot is None:
                result.tensors[target] = _reshaped(target, tensor)
            else:
                joined.setdefault(target, {})[slot] = tensor
    for target, parts in joined.items():
        if architecture == "beit" and target.endswith("qkv.bias"):
            parts.setdefault(1, torch.zeros_like(parts[0]))  # its keys have no bias; to softmax it makes no difference
        if len(parts) == (2 if ".cross.kv." in target else 3):
            result.tensors[target] = torch.cat([parts[slot] for slot in sorted(parts)])
    _fold_token_types(weights, result)
    if architecture in ("clip", "beit"):
        _list_zeros(result)
    if _DECODER_WORDS in weights:
        # The last linear map of BLIP's decoder is tied to its word embedding, and files contain tied weights once.
        result.tensors.setdefault("losses.vocabulary.decoder.weight", weights[_DECODER_WORDS])
        result.sources.setdefault("losses.vocabulary.decoder.weight", [_DECODER_WORDS])
    return result


def _places(name: str, architecture: Architecture, stacks: Sequence[Stack], depth: int) -> list[tuple[str, int | None]]:
    """Targets of a tensor: our names, and the index of its part of a joint projection."""
    if architecture in ("clip", "blip"):
        if found := _found(name, _HEADS):
            # BlipModel's projections have inputs that we do not compute: a pooler's, and visual features normalised
            # twice.
            return [(_target(*found), None)] if architecture == "clip" or "visual_projection" not in name else []
        part, _, rest = name.partition(".")
        if part in ("text_encoder", "text_decoder") or (part == "text_model" and architecture == "blip"):
            decoder = part == "text_decoder"
            return _text(rest.removeprefix("bert."), ("generation",) if decoder else ("text", "alignment"), decoder)
        return _visual(name.removeprefix("vision_model."), _CLIP, depth)
    plain = _PREFIX.sub("", name)
    return _text(plain, stacks) if architecture == "bert" else _visual(plain, _VIT, depth)


def _visual(name: str, table: Mapping[str, str], depth: int) -> list[tuple[str, int | None]]:
    found = _found(name, table)
    if found is None:
        return []
    target, match = _target(*found), found[1].groupdict()
    if "*" in target:  # one for all blocks; ours has one for each block
        return [(target.replace("*", f"{index:02d}"), None) for index in range(depth)]
    if "layer" not in match:
        return [(target, None)]
    return [(f"visual_{int(match['layer']):02d}.block.{target}", _slot(match))]


def _text(name: str, stacks: Sequence[Stack], decoder: bool = False) -> list[tuple[str, int | None]]:
    found = _found(name, _BERT)
    if found is None:
        return []
    target, match = _target(*found), found[1].groupdict()
    if "layer" not in match:
        return [(target, None)]
    places: list[tuple[str, int | None]] = []
    for stack in stacks:
        if stack == "text" and target.startswith(("cross.", "norm2.")):
            continue
        # The second norm of an encoder's block is its last, since it has no cross-attention.
        part = target.replace("norm3.", "norm2.") if stack == "text" else target
        slot = _slot(match)
        if slot is not None and target.startswith("cross.kv"):
            slot -= 1
        places.append((f"{stack}_{int(match['layer']):02d}.block.{part}", slot))
    return places


def _found(name: str, table: Mapping[str, str]) -> tuple[str, re.Match[str]] | None:
    for pattern, target in table.items():
        if match := re.fullmatch(pattern, name):
            return target, match
    return None


def _target(target: str, match: re.Match[str]) -> str:
    ending = match.groupdict().get("ending")
    return target if ending is None else f"{target}.{ending}"


def _slot(match: Mapping[str, str]) -> int | None:
    return _SLOTS[match["slot"]] if match.get("slot") else None


def _stands_twice(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a table of BLIP's text decoder differs from its text encoder's: our streams share one."""
    other = name.replace("text_decoder.bert.embeddings.", "text_encoder.embeddings.")
    if other == name or other not in weights or weights[name].is_meta:
        return False
    return not torch.equal(weights[name], weights[other])


def _reshaped(target: str, tensor: Tensor) -> Tensor:
    """Takes off the batch dimension of tables, and flattens the convolution to a matrix."""
    if target in ("embed.block.visual.class_token", "embed.block.visual.mask_token"):
        return tensor.flatten()
    if target in ("embed.block.visual.positions", "embed.block.visual.times"):
        return tensor.flatten(0, -2)
    return tensor.flatten(1) if target == "embed.block.visual.patches.weight" else tensor


def _fold_token_types(weights: Mapping[str, Tensor], result: Translation) -> None:
    """Adds the first token type to the positions: our texts are always one segment."""
    positions = "embed.block.text.positions"
    for name in [name for name in result.unused if name.endswith(TOKEN_TYPES)]:
        result.tensors[positions] = result.tensors[positions] + weights[name][0]
        result.sources[positions].append(name)
        result.unused.remove(name)


def _list_zeros(result: Translation) -> None:
    """Lists biases of patches and projections, and absolute positions, where the weights have none."""
    for part in ("embed.block.visual.patches", "contrast.visual_projection"):
        if f"{part}.weight" in result.tensors and f"{part}.bias" not in result.tensors:
            result.zeros.append(f"{part}.bias")
    if "embed.block.visual.class_token" in result.tensors and "embed.block.visual.positions" not in result.tensors:
        result.zeros.append("embed.block.visual.positions")
