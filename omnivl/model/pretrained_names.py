"""Which parameter of ours a Hugging Face parameter becomes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Architecture = Literal["vit", "timesformer", "bert"]
Stack = Literal["text", "alignment", "generation"]

_PREFIX = re.compile(r"^(?:vit|bert|timesformer|model)\.")
_LAYER = r"(?:encoder\.layer|layers)\.(?P<layer>\d+)\."
_ENDING = r"\.(?P<ending>weight|bias)"

_VISUAL_EMBEDDING = {
    r"embeddings\.cls_token": "embed.block.visual.class_token",
    r"embeddings\.position_embeddings": "embed.block.visual.positions",
    r"embeddings\.time_embeddings": "embed.block.visual.times",
    r"embeddings\.patch_embeddings\.projection" + _ENDING: "embed.block.visual.patches",
    r"layernorm" + _ENDING: "visual_norm.block",
}
_TEXT_EMBEDDING = {
    r"embeddings\.word_embeddings\.weight": "embed.block.text.words",
    r"embeddings\.position_embeddings\.weight": "embed.block.text.positions",
    r"embeddings\.LayerNorm" + _ENDING: "embed.block.text.norm",
}
# transformers 5 renamed ViT's modules; its files keep the old names. Both are understood.
_VISUAL_BLOCK = {
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.attention\.qkv": "attention.qkv",
    r"attention\.(?:attention\.)?(?P<slot>query|key|value|q_proj|k_proj|v_proj)": "attention.qkv",
    r"attention\.(?:output\.dense|o_proj)": "attention.out",
    r"(?:intermediate\.dense|mlp\.fc1)": "ffn.fc1",
    r"(?:output\.dense|mlp\.fc2)": "ffn.fc2",
    r"temporal_layernorm": "temporal.norm",
    r"temporal_attention\.attention\.qkv": "temporal.attention.qkv",
    r"temporal_attention\.output\.dense": "temporal.attention.out",
    r"temporal_dense": "temporal.temporal_fc",
}
_TEXT_BLOCK = {
    r"attention\.self\.(?P<slot>query|key|value)": "attention.qkv",
    r"attention\.output\.dense": "attention.out",
    r"attention\.output\.LayerNorm": "norm1",
    r"intermediate\.dense": "ffn.fc1",
    r"output\.dense": "ffn.fc2",
    r"output\.LayerNorm": "norm2",
}
_SLOTS = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}


@dataclass(frozen=True)
class Translation:
    """A checkpoint in our names.

    Attributes:
        tensors: Values by our names, shaped as ours but for tables of another length.
        sources: The checkpoint's names behind each of them.
        unused: The checkpoint's names that mean nothing to us.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, list[str]]
    unused: list[str]


def detect(weights: Mapping[str, Tensor]) -> Architecture | None:
    """The architecture that a checkpoint's names tell; None if it is none of ours."""
    names = " ".join(weights)
    if "temporal_attention." in names:
        return "timesformer"
    if "embeddings.word_embeddings" in names:
        return "bert"
    return "vit" if "embeddings.patch_embeddings.projection" in names else None


def translate(weights: Mapping[str, Tensor], architecture: Architecture, stacks: Sequence[Stack]) -> Translation:
    """Renames and joins a checkpoint's tensors.

    Args:
        weights: Values, or gradients, by the checkpoint's names.
        architecture: Of the checkpoint.
        stacks: Stacks that a BERT's blocks go into.
    """
    result = Translation({}, {}, [])
    joined: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        plain = _PREFIX.sub("", name).replace("LayerNorm.gamma", "LayerNorm.weight").replace(".beta", ".bias")
        places = _places(plain, architecture, stacks)
        if not places:
            result.unused.append(name)
        for target, slot in places:
            result.sources.setdefault(target, []).append(name)
            if slot is None:
                result.tensors[target] = _reshaped(target, tensor)
            else:
                joined.setdefault(target, {})[slot] = tensor
    for target, parts in joined.items():
        if len(parts) == len(("query", "key", "value")):
            result.tensors[target] = torch.cat([parts[slot] for slot in sorted(parts)])
    _fold_token_types(weights, result)
    return result


def _places(name: str, architecture: Architecture, stacks: Sequence[Stack]) -> list[tuple[str, int | None]]:
    """Where a tensor goes: our names, and which third of the joint projection it is."""
    text = architecture == "bert"
    for pattern, target in (_TEXT_EMBEDDING if text else _VISUAL_EMBEDDING).items():
        if match := re.fullmatch(pattern, name):
            ending = match.groupdict().get("ending")
            return [(target if ending is None else f"{target}.{ending}", None)]
    for pattern, target in (_TEXT_BLOCK if text else _VISUAL_BLOCK).items():
        if match := re.fullmatch(_LAYER + pattern + _ENDING, name):
            found = match.groupdict()
            slot = _SLOTS[found["slot"]] if found.get("slot") else None
            places = []
            for stack in stacks if text else ("visual",):
                # A decoder's last norm is its third: cross-attention has the second.
                part = "norm3" if target == "norm2" and stack in ("alignment", "generation") else target
                places.append((f"{stack}_{int(found['layer']):02d}.block.{part}.{found['ending']}", slot))
            return places
    return []


def _reshaped(target: str, tensor: Tensor) -> Tensor:
    """Takes off the batch dimension of tables, and flattens the convolution to a matrix."""
    if target == "embed.block.visual.class_token":
        return tensor.flatten()
    if target in ("embed.block.visual.positions", "embed.block.visual.times"):
        return tensor.squeeze(0)
    return tensor.flatten(1) if target == "embed.block.visual.patches.weight" else tensor


def _fold_token_types(weights: Mapping[str, Tensor], result: Translation) -> None:
    """Adds the first token type to the positions: our texts are always one segment."""
    positions = "embed.block.text.positions"
    for name in [name for name in result.unused if name.endswith("token_type_embeddings.weight")]:
        result.tensors[positions] = result.tensors[positions] + weights[name][0]
        result.sources[positions].append(name)
        result.unused.remove(name)
