"""The configuration in a Hugging Face folder: sizes that no shape shows, options, normalisation of pixels."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnivl.architectures import OmniVL
from omnivl.architectures.foreign import CLIP_PIXELS, OUR_PIXELS, Pixels, read_json, read_pixels
from omnivl.errors import ModelError
from omnivl.parts.bert import TEXT_EPS
from omnivl.pretrained.names import Architecture

MODEL_TYPES: Mapping[str, Architecture] = {
    **dict.fromkeys(("vit", "vit_mae", "vit_msn"), "vit"),
    "timesformer": "timesformer",
    **dict.fromkeys(("beit", "data2vec-vision"), "beit"),
    "bert": "bert",
    **dict.fromkeys(("clip", "clip_vision_model"), "clip"),
    **dict.fromkeys(("blip", "blip_vision_model", "blip_text_model"), "blip"),
}
"""Supported model types. Others have the same names of weights but compute something else (RoBERTa counts its positions
from 2, DeiT has a second class token)."""

_NAMES = {"gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True)
class Description:
    """The configuration of a folder's model.

    Attributes:
        architecture: Architecture of the weights.
        vision: Its configuration of the visual encoder; empty where there is none.
        text: Its configuration of the text encoder or decoder; empty where there is none.
        pixels: How pixels are normalised.
    """

    architecture: Architecture
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    pixels: Pixels


def describe(path: Path, architecture: Architecture) -> Description:
    """Reads ``config.json`` and the processor's configuration; a weight file alone is taken to be of the usual kind.

    Args:
        path: A folder or a weight file.
        architecture: Of its weights, by their names.

    Raises:
        ModelError: The folder says that it is of another kind than its weights' names.
    """
    config = read_json(path / "config.json") if path.is_dir() else {}
    kind = config.get("model_type")
    if kind is not None and MODEL_TYPES.get(kind) != architecture:
        raise ModelError(
            f"{path / 'config.json'}: got model_type {kind!r}, whose weights are not understood; allowed are "
            f"{', '.join(MODEL_TYPES)}; give a checkpoint of one of these"
        )
    vision = config.get("vision_config", {} if architecture == "bert" or kind == "blip_text_model" else config)
    text = config.get("text_config", config if architecture == "bert" or kind == "blip_text_model" else {})
    pixels = read_pixels(path, CLIP_PIXELS if architecture in ("clip", "blip") else OUR_PIXELS)
    return Description(architecture, vision, text, pixels)


def unmet_options(said: Description, model: OmniVL, *, vision: bool, text: bool) -> list[str]:
    """Settings that the model needs to compute the same as the checkpoint's model; one line each."""
    wanted: dict[str, tuple[object, object]] = {}
    if vision:
        activation = _activation(said.vision, "quick_gelu" if said.architecture == "clip" else "gelu")
        wanted["vision.activation"] = (model.vision.activation, activation)
        wanted["num_heads"] = (model.num_heads, said.vision.get("num_attention_heads", model.num_heads))
        if said.architecture == "clip":
            wanted["vision.norm_embeddings"] = (model.vision.norm_embeddings, True)
        if said.architecture == "beit":
            relative = [said.vision.get(f"use_{way}relative_position_bias", False) for way in ("", "shared_")]
            wanted["vision.relative_positions"] = (model.vision.relative_positions, any(relative))
            scale = said.vision.get("layer_scale_init_value", 0.1)
            if scale > 0 and model.layer_scale_init is None:
                wanted["layer_scale_init"] = (None, scale)
    if text:
        wanted["text_norm"] = (model.text_norm, "post")
        wanted["activation of texts"] = ("gelu", _activation(said.text, "gelu"))
        wanted["num_heads"] = (model.num_heads, said.text.get("num_attention_heads", model.num_heads))
    return [
        f"model.{name}: got {_shown(own)}; allowed {_shown(value)} with these weights"
        for name, (own, value) in wanted.items()
        if own != value
    ]


def near_misses(said: Description, model: OmniVL, *, vision: bool, text: bool) -> list[str]:
    """Small differences between the model and the checkpoint's model."""
    found: list[str] = []
    for wanted, part, own, where in (
        (vision, said.vision, model.vision.norm_eps, " (model.vision.norm_eps)"),
        (text, said.text, TEXT_EPS, ""),
    ):
        eps = part.get("layer_norm_eps", own)
        if wanted and eps != own:
            found.append(f"layer_norm_eps {eps:g} there, {own:g} here{where}")
    if vision and said.architecture == "beit" and said.vision.get("use_mean_pooling", False):
        found.append("no normalisation behind the last block there (its mean pooling has one); ours keeps its own")
    if text and said.architecture == "blip":
        found.append(
            "the alignment decoder reads embeddings there, the text encoder's output here: matching is to train"
        )
    return found


def _activation(config: Mapping[str, Any], usual: str) -> str:
    name = config.get("hidden_act", usual)
    return _NAMES.get(name, str(name))


def _shown(value: object) -> str:
    """As YAML has it."""
    return json.dumps(value)
