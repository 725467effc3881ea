"""GIT's weights under our names and those of transformers' ``GitForCausalLM``, in both directions.

Shapes: D width of the decoder.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures.bert_names import TEXT_BLOCK
from omnivl.architectures.clip_names import from_transformers as tower_from_transformers
from omnivl.architectures.clip_names import image_processor, tower_from_clip
from omnivl.architectures.clip_names import names as tower_names
from omnivl.architectures.foreign import (
    CLIP_PIXELS,
    Foreign,
    divided,
    joined,
    read_json,
    read_pixels,
    refuse_unmet,
    stack_config,
    unmet,
)
from omnivl.chain.chain import Chain
from omnivl.data.special_tokens import SpecialTokens
from omnivl.parts.sizes import Patches, Transformer

TELLING = {"git.image_encoder.vision_model.pre_layrnorm.weight", "git.visual_projection.visual_projection.0.weight"}
"""Names that the weights of every ``GitForCausalLM`` have."""
_VISION, _PATCHES = "git.image_encoder.", "embed.block.visual.patches.weight"
_TIMES = "visual_map.block.times"
_WHOLE = {
    "embed.block.text.words": "git.embeddings.word_embeddings.weight",
    "embed.block.text.positions": "git.embeddings.position_embeddings.weight",
}
_MAPS = {
    "embed.block.text.norm": "git.embeddings.LayerNorm",
    "visual_map.block.linear": "git.visual_projection.visual_projection.0",
    "visual_map.block.norm": "git.visual_projection.visual_projection.1",
    "losses.vocabulary.decoder": "output",
}


def names(vision_layers: int, decoder_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter of ours with the parameters of the class that it concatenates, but for the frames' embeddings."""
    for ours, parts in tower_names(vision_layers, 0):
        if parts[0].startswith("vision_model."):
            yield ours, tuple(_VISION + part for part in parts)
    for ours, theirs in _WHOLE.items():
        yield ours, (theirs,)
    joint: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _MAPS.items()}
    for index in range(decoder_layers):
        block, theirs = f"generation_{index:02d}.block", f"git.encoder.layer.{index}"
        joint |= {f"{block}.{own}": tuple(f"{theirs}.{part}" for part in parts) for own, parts in TEXT_BLOCK.items()}
    for ours, parts in joint.items():
        for ending in ("weight", "bias"):
            yield f"{ours}.{ending}", tuple(f"{part}.{ending}" for part in parts)


def from_transformers(
    weights: Mapping[str, Tensor], path: Path, vision: Transformer, decoder: Transformer
) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    Args:
        weights: By the class's names, or by those of CLIP's image tower.
        path: The folder or file.
        vision: Our image encoder.
        decoder: Our decoder.

    Returns:
        None if the weights are of neither.

    Raises:
        ModelError: Options of ours compute something else.
    """
    if (tower := tower_from_clip(weights, path, vision)) is not None:
        return tower
    if not weights.keys() >= TELLING:
        return None
    said = read_json(path / "config.json") if path.is_dir() else {}
    refuse_unmet(path, _unmet(said, vision, decoder))
    pixels = read_pixels(path if path.is_dir() else path.parent, CLIP_PIXELS)
    tower = {name.removeprefix(_VISION): one for name, one in weights.items() if name.startswith(_VISION)}
    found = tower_from_transformers(tower, pixels)
    start = "git.encoder.layer."
    depth = 1 + max(int(name[len(start) :].partition(".")[0]) for name in weights if name.startswith(start))
    others = {name: one for name, one in weights.items() if not name.startswith(_VISION)}
    joint, rest = joined(others, names(0, depth))
    frames = sorted(name for name in rest if name.startswith("git.img_temporal_embedding."))
    if frames:
        found[_TIMES] = torch.cat([rest.pop(name).flatten(0, 1) for name in frames])
    return found | joint | rest


def to_transformers(
    sizes: Patches, vision: Transformer, decoder: Transformer, words: int, chain: Chain, tokens: SpecialTokens
) -> Foreign:
    """A chain of dense stacks as ``GitForCausalLM``."""
    own = {name: tensor.detach() for name, tensor in chain.state_dict().items()}
    own[_PATCHES] = own[_PATCHES].view(vision.hidden_size, 3, sizes.patch_size, sizes.patch_size)
    weights = divided(own, names(vision.layers, decoder.layers))
    for frame, one in enumerate(own.get(_TIMES, ())):
        weights[f"git.img_temporal_embedding.{frame}"] = one.clone()[None, None]
    config = {
        "model_type": "git",
        "vision_config": {
            **stack_config(vision),
            **{"model_type": "git_vision_model", "image_size": sizes.image_size, "patch_size": sizes.patch_size},
        },
        **stack_config(decoder),
        "vocab_size": words,
        "max_position_embeddings": len(own["embed.block.text.positions"]),
        "hidden_dropout_prob": decoder.dropout,
        "attention_probs_dropout_prob": 0.0,
        "num_image_with_embedding": sizes.num_frames if _TIMES in own else None,
        "tie_word_embeddings": False,
        **{"pad_token_id": tokens.pad, "bos_token_id": tokens.cls, "eos_token_id": tokens.sep},
    }
    placed = {ours for ours, _ in names(vision.layers, decoder.layers)} | {_TIMES}
    left = tuple(name for name, _ in chain.named_parameters() if name not in placed)
    return Foreign("GitForCausalLM", config, weights, image_processor(sizes.image_size), left)


def _unmet(said: Mapping[str, Any], vision: Transformer, decoder: Transformer) -> Iterator[str]:
    """Options that the weights need and shapes do not show, as unfinished messages.

    Args:
        said: Content of ``config.json``; missing fields have the class's defaults. Empty: nothing is known.
        vision: Our image encoder.
        decoder: Our decoder.
    """
    if not said:
        return
    tower = said.get("vision_config", {})
    for name, own, config, activation, eps in (
        ("vision", vision, tower, "quick_gelu", 1e-5),
        ("decoder", decoder, said, "gelu", 1e-12),
    ):
        wanted = {
            "num_heads": config.get("num_attention_heads", 12),
            "activation": config.get("hidden_act", activation),
            "norm_eps": config.get("layer_norm_eps", eps),
        }
        yield from unmet(name, own, wanted)
    yield from unmet("decoder", decoder, {"norm": "post"})
