"""CLIP's weights under our names and those of transformers' ``CLIPModel``, in both directions.

Shapes: D hidden size, P projection size, p side of a patch.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures.foreign import (
    CLIP_PIXELS,
    OUR_PIXELS,
    Foreign,
    Pixels,
    divided,
    fold_pixels,
    joined,
    read_json,
    read_pixels,
    refuse_unmet,
    stack_config,
    unmet,
)
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.parts.project import Project
from omnivl.parts.sizes import Transformer

_TABLES = {
    "embed.block.visual.class_token": "vision_model.embeddings.class_embedding",
    "embed.block.visual.positions": "vision_model.embeddings.position_embedding.weight",
    "embed.block.visual.patches.weight": "vision_model.embeddings.patch_embedding.weight",
    "embed.block.text.words": "text_model.embeddings.token_embedding.weight",
    "embed.block.text.positions": "text_model.embeddings.position_embedding.weight",
    "contrast.visual_projection.weight": "visual_projection.weight",
    "contrast.text_projection.weight": "text_projection.weight",
    "contrast.logit_scale": "logit_scale",
}
_NORMS = {
    "embed.block.visual.norm": "vision_model.pre_layrnorm",
    "visual_norm.block": "vision_model.post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "attention.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}
_TOWERS = {"visual": "vision_model", "text": "text_model"}
_QKV = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v"))
_PATCHES, _POSITIONS = "embed.block.visual.patches.weight", "embed.block.visual.positions"


def names(vision_layers: int, text_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter of ours with the parameters of ``CLIPModel`` that it concatenates."""
    for ours, theirs in _TABLES.items():
        yield ours, (theirs,)
    maps = {**_NORMS, f"text_{text_layers - 1:02d}.block.norm_out": "text_model.final_layer_norm"}
    joint: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in maps.items()}
    for stack, layers in (("visual", vision_layers), ("text", text_layers)):
        for index in range(layers):
            block, theirs = f"{stack}_{index:02d}.block", f"{_TOWERS[stack]}.encoder.layers.{index}"
            joint |= {f"{block}.{name}": (f"{theirs}.{other}",) for name, other in _BLOCK.items()}
            joint[f"{block}.attention.qkv"] = tuple(f"{theirs}.{part}" for part in _QKV)
    for ours, parts in joint.items():
        for ending in ("weight", "bias"):
            yield f"{ours}.{ending}", tuple(f"{part}.{ending}" for part in parts)


def from_transformers(weights: Mapping[str, Tensor], pixels: Pixels) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    A different normalisation of pixels is folded into the patch embedding and, since that has no bias, into the
    positions of all patches.

    Args:
        weights: By names of ``CLIPModel``.
        pixels: How the checkpoint's pixels are normalised.
    """
    depths = [1 + max((_block(name, tower) for name in weights), default=-1) for tower in _TOWERS.values()]
    found, rest = joined(weights, names(*depths))
    found |= rest
    if "contrast.logit_scale" in found:
        found["contrast.logit_scale"] = found["contrast.logit_scale"].reshape(1)
    found[_PATCHES] = found[_PATCHES].flatten(1)
    if pixels != OUR_PIXELS:
        weight = found[_PATCHES]
        found[_PATCHES], shift = fold_pixels(weight, weight.new_zeros(len(weight)), pixels)
        positions = found[_POSITIONS]
        found[_POSITIONS] = torch.cat([positions[:1], positions[1:] + shift])
    return found


def to_transformers(
    sizes: HeadSizes, image_size: int, towers: tuple[Transformer, Transformer], chain: Chain, tokens: SpecialTokens
) -> Foreign:
    """A chain of dense towers as ``CLIPModel``; the temperature is written clamped to its bounds."""
    vision, text = towers
    own = {name: tensor.detach() for name, tensor in chain.state_dict().items()}
    project = chain.get_submodule("contrast")
    assert isinstance(project, Project)
    own["contrast.logit_scale"] = project.scale().detach().log()
    own[_PATCHES] = own[_PATCHES].view(vision.hidden_size, 3, sizes.patch_size, sizes.patch_size)
    weights = divided(own, names(vision.layers, text.layers))
    ends = {"pad_token_id": tokens.pad, "bos_token_id": tokens.cls, "eos_token_id": tokens.sep}
    config = {
        "model_type": "clip",
        "projection_dim": sizes.projection_size,
        "vision_config": {
            **stack_config(vision),
            **{"projection_dim": sizes.projection_size, "image_size": image_size, "patch_size": sizes.patch_size},
        },
        "text_config": {
            **stack_config(text),
            **{"projection_dim": sizes.projection_size, "vocab_size": sizes.vocab_size},
            **{"max_position_embeddings": sizes.text_length, **ends},
        },
    }
    heads = tuple(name for name, _ in chain.named_parameters() if name.startswith("losses."))
    return Foreign("CLIPModel", config, weights, image_processor(image_size), heads)


def tower_from_clip(weights: Mapping[str, Tensor], path: Path, vision: Transformer) -> dict[str, Tensor] | None:
    """CLIP's image tower alone under our names, for architectures that start from it.

    Args:
        weights: By the names of ``CLIPModel`` or ``CLIPVisionModel``.
        path: The folder or file.
        vision: Our image encoder.

    Returns:
        None if the weights are of no CLIP.

    Raises:
        ModelError: Options of ours compute something else.
    """
    start = "vision_model."
    if "embeddings.class_embedding" in weights:  # ``CLIPVisionModel``
        weights = {start + name: tensor for name, tensor in weights.items()}
    if "vision_model.pre_layrnorm.weight" not in weights:
        return None
    said = read_json(path / "config.json") if path.is_dir() else {}
    refuse_unmet(path, unmet_options(said, vision, None))
    tower = {name: tensor for name, tensor in weights.items() if name.startswith(start)}
    return from_transformers(tower, read_pixels(path if path.is_dir() else path.parent, CLIP_PIXELS))


def unmet_options(config: Mapping[str, Any], vision: Transformer, text: Transformer | None) -> list[str]:
    """Options that the towers need to compute the same as a ``CLIPModel``.

    Args:
        config: Content of its ``config.json``; missing fields have the class's defaults.
        vision: Our image tower.
        text: Our text tower; None if it is not asked for.
    """
    found: list[str] = []
    for name, tower, heads in (("vision", vision, 12), ("text", text, 8)):
        if tower is None:
            continue
        said = config.get(f"{name}_config", config if config.get("model_type") == f"clip_{name}_model" else {})
        wanted = {
            "activation": said.get("hidden_act", "quick_gelu"),
            "norm_eps": said.get("layer_norm_eps", 1e-5),
        }
        if config:  # a weight file alone does not tell the number of heads
            wanted["num_heads"] = said.get("num_attention_heads", heads)
        found += unmet(name, tower, wanted)
    return found


def _block(name: str, tower: str) -> int:
    """Index of the block of a tower that a parameter of ``CLIPModel`` belongs to; -1 for others."""
    start = f"{tower}.encoder.layers."
    return int(name.removeprefix(start).partition(".")[0]) if name.startswith(start) else -1


def image_processor(image_size: int) -> dict[str, Any]:
    """Content of ``preprocessor_config.json``: the view of evaluation, and pixels from -1 to 1.

    Resized pictures differ slightly from ours, which are cropped before they are resized.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 2,  # bilinear: the PIL filter nearest to ours
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(OUR_PIXELS.mean),
        "image_std": list(OUR_PIXELS.std),
    }
