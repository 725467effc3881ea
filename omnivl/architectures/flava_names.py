"""FLAVA's weights under our names and those of transformers' classes, in both directions.

Shapes: D hidden size.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures.clip_names import image_processor
from omnivl.architectures.foreign import (
    CLIP_PIXELS,
    OUR_PIXELS,
    Foreign,
    divided,
    fold_pixels,
    joined,
    read_json,
    read_pixels,
    refuse_stack,
    refuse_unmet,
    stack_config,
    unmet,
)
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.parts.project import Project
from omnivl.parts.sizes import Transformer

Names = Iterator[tuple[str, tuple[str, ...]]]
"""A parameter of ours, and the parameters of ``FlavaModel`` whose rows it concatenates."""

_PATCHES, _POSITIONS = "embed.block.visual.patches", "embed.block.text.positions"
_TYPES = "text_model.embeddings.token_type_embeddings.weight"
_TABLES = {
    "embed.block.visual.class_token": "image_model.embeddings.cls_token",
    "embed.block.visual.mask_token": "image_model.embeddings.mask_token",
    "embed.block.visual.positions": "image_model.embeddings.position_embeddings",
    "embed.block.text.words": "text_model.embeddings.word_embeddings.weight",
    _POSITIONS: "text_model.embeddings.position_embeddings.weight",
    "fused_embed.block.class_token": "multimodal_model.cls_token",
    "contrast.logit_scale": "logit_scale",
}
_FLAT = ("embed.block.visual.class_token", "embed.block.visual.mask_token", "fused_embed.block.class_token")
"""Tables with two more dimensions there."""
_MAPS = {
    _PATCHES: "image_model.embeddings.patch_embeddings.projection",
    "embed.block.text.norm": "text_model.embeddings.LayerNorm",
    "encoded.block.norms.visual": "image_model.layernorm",
    "encoded.block.norms.text": "text_model.layernorm",
    "encoded.block.to_fused.visual": "image_to_mm_projection",
    "encoded.block.to_fused.text": "text_to_mm_projection",
    "contrast.visual_projection": "image_projection",
    "contrast.text_projection": "text_projection",
    "fused_norm.block.norm": "multimodal_model.layernorm",
    "fused_norm.block.pooler": "multimodal_model.pooler.dense",
}
_ENCODERS = {
    "vision": ("visual", "image_model"),
    "text": ("text", "text_model"),
    "fusion": ("fused", "multimodal_model"),
}
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_BLOCK: Mapping[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before",),
    "attention.qkv": _QKV,
    "attention.out": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "ffn.fc1": ("intermediate.dense",),
    "ffn.fc2": ("output.dense",),
}
_FUSED = {
    "norm1": "norm1.shared",
    "attention.qkv": "qkv.shared",
    "attention.out": "out.shared",
    "norm2": "norm2.shared",
}
"""Other names in blocks of fused rows."""
_TRANSFORM = {"transform": "transform.dense", "norm": "transform.LayerNorm", "decoder": "decoder"}
_HEADS = {
    "losses.vocabulary": "mlm_head",
    "losses.heads.mrm.codes.scores": "mim_head",
    "losses.heads.mmm.words": "mmm_text_head",
    "losses.heads.mmm.patches.codes.scores": "mmm_image_head",
}


def _names(layers: Mapping[str, int]) -> Names:
    """The parameters of ``FlavaModel``."""
    for ours, theirs in _TABLES.items():
        yield ours, (theirs,)
    joint: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _MAPS.items()}
    for name, (stack, model) in _ENCODERS.items():
        for index in range(layers[name]):
            for part, others in _BLOCK.items():
                own = _FUSED.get(part, part) if name == "fusion" else part
                joint[f"{stack}_{index:02d}.block.{own}"] = tuple(
                    f"{model}.encoder.layer.{index}.{other}" for other in others
                )
    for ours, parts in joint.items():
        for ending in ("weight", "bias"):
            yield f"{ours}.{ending}", tuple(f"{part}.{ending}" for part in parts)


def _heads() -> Names:
    """The parameters of the heads of ``FlavaForPreTraining``."""
    for ours, theirs in _HEADS.items():
        for own, other in _TRANSFORM.items():
            for ending in ("weight", "bias"):
                yield f"{ours}.{own}.{ending}", (f"{theirs}.{other}.{ending}",)
    for ending in ("weight", "bias"):
        yield f"losses.heads.mmm.match.output.{ending}", (f"itm_head.seq_relationship.{ending}",)


def from_transformers(weights: Mapping[str, Tensor], path: Path, layers: Mapping[str, int]) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    A different normalisation of pixels is folded into the patch embedding, and the first token type into the positions.
    The pooler is that of the head that matches, where there is one.

    Args:
        weights: By the folder's names.
        path: The folder, or the file.
        layers: Blocks of our encoders, by their fields.
    """
    given = {name.removeprefix("flava."): tensor for name, tensor in weights.items()}
    for ending in ("weight", "bias"):
        if (own := given.pop(f"itm_head.pooler.dense.{ending}", None)) is not None:
            given[f"multimodal_model.pooler.dense.{ending}"] = own
    for head in _HEADS.values():  # the bias of the last map under both of its names, or under one
        if (bias := given.pop(f"{head}.bias", None)) is not None:
            given.setdefault(f"{head}.decoder.bias", bias)
    found, rest = joined(given, [*_names(layers), *_heads()])
    if _POSITIONS in found and (types := rest.pop(_TYPES, None)) is not None:
        found[_POSITIONS] = found[_POSITIONS] + types[0]
    for name in _FLAT:
        if name in found:
            found[name] = found[name].flatten()
    if (table := found.get("embed.block.visual.positions")) is not None:
        found["embed.block.visual.positions"] = table[0]
    if "contrast.logit_scale" in found:
        found["contrast.logit_scale"] = found["contrast.logit_scale"].reshape(1)
    if f"{_PATCHES}.weight" in found:
        pixels = read_pixels(path, CLIP_PIXELS) if path.is_dir() else CLIP_PIXELS
        folded = found[f"{_PATCHES}.weight"].flatten(1), found[f"{_PATCHES}.bias"]
        folded = folded if pixels == OUR_PIXELS else fold_pixels(*folded, pixels)
        found[f"{_PATCHES}.weight"], found[f"{_PATCHES}.bias"] = folded
    return found | rest


def to_transformers(
    sizes: HeadSizes,
    image_size: int,
    encoders: tuple[Transformer, Transformer, Transformer],
    chain: Chain,
    tokens: SpecialTokens,
) -> Foreign:
    """A chain as ``FlavaModel``; the temperature is written clamped to its bounds.

    Poolers of the image encoder and of the text encoder, which no loss of FLAVA reads, are the identity.
    """
    own = {name: tensor.detach() for name, tensor in chain.state_dict().items()}
    project = chain.get_submodule("contrast")
    assert isinstance(project, Project)
    own["contrast.logit_scale"] = project.scale().detach().log()
    vision, text, fusion = encoders
    own[f"{_PATCHES}.weight"] = own[f"{_PATCHES}.weight"].view(
        vision.hidden_size, 3, sizes.patch_size, sizes.patch_size
    )
    for name in _FLAT:
        own[name] = own[name][None, None]
    own["embed.block.visual.positions"] = own["embed.block.visual.positions"][None]
    weights = divided(own, _names({"vision": vision.layers, "text": text.layers, "fusion": fusion.layers}))
    weights[_TYPES] = torch.zeros(2, text.hidden_size)
    for model, stack in (("image_model", vision), ("text_model", text)):
        weights[f"{model}.pooler.dense.weight"] = torch.eye(stack.hidden_size)
        weights[f"{model}.pooler.dense.bias"] = torch.zeros(stack.hidden_size)
    config = {
        "model_type": "flava",
        "hidden_size": fusion.hidden_size,
        "layer_norm_eps": fusion.norm_eps,
        "projection_dim": sizes.projection_size,
        "image_config": {**_config(vision), "image_size": image_size, "patch_size": sizes.patch_size},
        "text_config": {
            **_config(text),
            **{"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.text_length},
            "pad_token_id": tokens.pad,
        },
        "multimodal_config": _config(fusion),
    }
    heads = tuple(name for name, _ in chain.named_parameters() if name.startswith("losses."))
    return Foreign("FlavaModel", config, weights, image_processor(image_size), heads)


def _config(stack: Transformer) -> dict[str, Any]:
    return stack_config(stack) | {"hidden_dropout_prob": stack.dropout}


def refuse_shape(stacks: Mapping[str, Transformer]) -> None:
    """Refuses encoders that ``FlavaModel`` does not have.

    Raises:
        ModelError: One of them has experts, or LayerScale.
    """
    for name, stack in stacks.items():
        refuse_stack(name, stack, "pre", "FlavaModel")


def refuse_options(path: Path, vision: Transformer, text: Transformer, fusion: Transformer) -> None:
    """Refuses a folder whose configuration differs from ours in an option that shapes do not show.

    Raises:
        ModelError: One line for each.
    """
    config = read_json(path / "config.json") if path.is_dir() else {}
    lines: list[str] = []
    for name, own, said in (
        ("vision", vision, config.get("image_config", {})),
        ("text", text, config.get("text_config", {})),
        ("fusion", fusion, config.get("multimodal_config", {})),
    ):
        wanted = {
            "num_heads": said.get("num_attention_heads", 12),
            "activation": said.get("hidden_act", "gelu"),
            "norm_eps": said.get("layer_norm_eps", 1e-12),
        }
        lines += unmet(name, own, wanted) if config else ()
    refuse_unmet(path, lines)
