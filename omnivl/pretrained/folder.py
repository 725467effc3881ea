"""What a Hugging Face folder says beside its weights: sizes that no shape shows, options, how pixels are normalised.

Shapes: D hidden size, C values of a patch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures import OmniVL
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
"""Model types whose weights are understood. Others share names with them and compute something else (RoBERTa counts its
positions from 2, DeiT has a second class token)."""

_CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_PLAIN_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NAMES = {"gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True)
class Description:
    """What a folder says of its model.

    Attributes:
        architecture: Of the weights.
        vision: Its configuration of the visual encoder; empty where there is none.
        text: Its configuration of the text encoder or decoder; empty where there is none.
        mean: Of the pixels' channels, in [0, 1], that is taken off.
        std: What they are then divided by.
    """

    architecture: Architecture
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
    pixels = read_json(path / "preprocessor_config.json") or read_json(path / "processor_config.json").get(
        "image_processor", {}
    )
    mean, std = _CLIP_PIXELS if architecture in ("clip", "blip") else _PLAIN_PIXELS
    if not pixels.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = tuple(pixels.get("image_mean", mean)), tuple(pixels.get("image_std", std))
    return Description(architecture, vision, text, mean, std)


def unmet_options(said: Description, model: OmniVL, *, vision: bool, text: bool) -> list[str]:
    """What the model has to be set to before it can compute what the weights were trained for; one line each."""
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
    """What differs a little between the model and what the weights were trained in."""
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


def fold_pixels(weight: Tensor, bias: Tensor, said: Description) -> tuple[Tensor, Tensor]:
    """The patch embedding for our pixels, whose mean and deviation are 0.5, that gives what it gave for its own.

    With x = (0.5 (p + 1) - mean) / std, W x + b = (0.5 W / std) p + b + sum(W (0.5 - mean) / std).

    Args:
        weight: ``[D, C]``, channel by channel.
        bias: ``[D]``.
        said: Mean and deviation.
    """
    channels = weight.view(len(weight), 3, -1).double()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (said.mean, said.std))
    folded = channels * (0.5 / std)
    shift = (channels * ((0.5 - mean) / std)).sum((1, 2))
    return folded.flatten(1).to(weight.dtype), (bias.double() + shift).to(bias.dtype)


def _activation(config: Mapping[str, Any], usual: str) -> str:
    name = config.get("hidden_act", usual)
    return _NAMES.get(name, str(name))


def _shown(value: object) -> str:
    """As YAML has it."""
    return json.dumps(value)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is no such file.

    Raises:
        ModelError: It is no JSON.
    """
    if not file.is_file():
        return {}
    try:
        read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: got a file that is no JSON ({error}); fetch it again") from error
    return read
