"""Weights of transformers' classes of BLIP-2 and BERT under our names.

Shapes: D hidden size.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures.foreign import Pixels, fold_pixels
from omnivl.parts.opt_names import is_opt, language_from_opt
from omnivl.parts.sizes import Transformer

TELLING = "qformer.layernorm.weight"
"""A name that the weights of all classes of BLIP-2 have."""
_BERT = "encoder.layer.0.attention.self.query.weight"

_LANGUAGE = "language_model."
_PATCHES = "embed.block.visual.patches"
_ENDING = r"\.(weight|bias)$"
_NAMES: Mapping[str, str] = {
    r"vision_model\.embeddings\.class_embedding$": "embed.block.visual.class_token",
    r"vision_model\.embeddings\.position_embedding$": "embed.block.visual.positions",
    r"vision_model\.embeddings\.patch_embedding" + _ENDING: rf"{_PATCHES}.\1",
    r"vision_model\.post_layernorm" + _ENDING: r"visual_norm.block.\1",
    r"query_tokens$": "embed.block.queries",
    r"embeddings\.word_embeddings\.weight$": "embed.block.text.words",
    r"embeddings\.position_embeddings\.weight$": "embed.block.text.positions",
    r"qformer\.layernorm" + _ENDING: r"embed.block.text.norm.\1",
    r"vision_projection" + _ENDING: r"contrast.visual_projection.\1",
    r"text_projection" + _ENDING: r"contrast.text_projection.\1",
    r"language_projection" + _ENDING: r"prefix.block.\1",
    r"itm_head" + _ENDING: r"losses.heads.vlm.output.\1",
}
_VISION: Mapping[str, str] = {
    "layer_norm1": "norm1",
    "self_attn.qkv": "attention.qkv",
    "self_attn.projection": "attention.out",
    "layer_norm2": "norm2",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
_QFORMER: Mapping[str, str] = {
    "attention.attention.query": "attention.qkv",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "crossattention.attention.query": "cross.q",
    "crossattention.attention.key": "cross.kv",
    "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "norm2",
    "intermediate.dense": "ffn.fc1",
    "output.dense": "ffn.fc2",
    "output.LayerNorm": "norm3",
    "intermediate_query.dense": "ffn_query.fc1",
    "output_query.dense": "ffn_query.fc2",
    "output_query.LayerNorm": "norm3_query",
}
_STACKS = {
    r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)": ("visual", _VISION),
    r"qformer\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)": ("qformer", _QFORMER),
}
_QFORMER_DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "cross_attention_frequency": 2,
}
_VISION_DEFAULTS: Mapping[str, Any] = {"num_attention_heads": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
"""Values of fields that a configuration leaves out."""
_OF_QUERIES = {"intermediate.": "intermediate_query.", "output.": "output_query."}


def from_transformers(weights: Mapping[str, Tensor], pixels: Pixels, layers: int) -> dict[str, Tensor] | None:
    """Weights of ``Blip2ForImageTextRetrieval`` and other BLIP-2 classes, or of ``BertModel`` and classes on it.

    Args:
        weights: By the folder's names.
        pixels: How the weights' own pixels are normalised.
        layers: Blocks of the Q-Former.

    Returns:
        None if they are of neither. BERT's feed-forward layers fill both those of words and those of queries.
    """
    given = {re.sub(r"^(bert|blip2)\.", "", name): tensor for name, tensor in weights.items()}
    if TELLING not in given:
        if _BERT not in given:
            return None
        given = _of_bert(given, layers)
    given = _packed(given)
    found = {own_name(name): tensor for name, tensor in given.items() if not name.startswith(_LANGUAGE)}
    language = {name.removeprefix(_LANGUAGE): one for name, one in given.items() if name.startswith(_LANGUAGE)}
    kept = {_LANGUAGE + name: one for name, one in language.items()}
    found |= language_from_opt(language) if is_opt(language) else kept
    for name in ("embed.block.visual.class_token", "embed.block.visual.positions", "embed.block.queries"):
        if name in found:
            flat = found[name].squeeze(0)
            found[name] = flat[0] if name.endswith("class_token") else flat
    if f"{_PATCHES}.weight" in found:
        weight, bias = found[f"{_PATCHES}.weight"].flatten(1), found[f"{_PATCHES}.bias"]
        found[f"{_PATCHES}.weight"], found[f"{_PATCHES}.bias"] = fold_pixels(weight, bias, pixels)
    return found


def _of_bert(given: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's weights by the names of a Q-Former that starts from it; token types are folded into the positions."""
    found = {name: given[name] for name in given if name.startswith("embeddings.word")}
    types = given["embeddings.token_type_embeddings.weight"]
    found["embeddings.position_embeddings.weight"] = given["embeddings.position_embeddings.weight"] + types[0]
    for name, tensor in given.items():
        if name.startswith("embeddings.LayerNorm."):
            found[name.replace("embeddings.LayerNorm", "qformer.layernorm")] = tensor
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if block is None or int(block[1]) >= layers:
            continue
        start, part = f"qformer.encoder.layer.{block[1]}.", block[2].replace("attention.self", "attention.attention")
        found[start + part] = tensor
        for words, queries in _OF_QUERIES.items():
            if part.startswith(words):
                found[start + queries + part.removeprefix(words)] = tensor
    return found


def _packed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenates the maps to queries, keys and values, as ours are, under the name of the first of them."""
    found = dict(given)
    for name in given:
        if re.search(r"\.attention\.attention\.query\.", name):
            parts = [found.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
            found[name] = torch.cat(parts)
        elif re.search(r"\.crossattention\.attention\.key\.", name):
            found[name] = torch.cat([found.pop(name), found.pop(name.replace(".key.", ".value."))])
    return found


def own_name(name: str) -> str:
    """Our name of a tensor of transformers; its own name if there is no place for it."""
    for pattern, (stack, parts) in _STACKS.items():
        if found := re.fullmatch(pattern, name):
            index, part, ending = found.groups()
            return f"{stack}_{int(index):02d}.block.{parts[part]}.{ending}" if part in parts else name
    for pattern, own in _NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name)
    return name


def unmet_options(config: Mapping[str, Any], vision: Transformer, qformer: Transformer, cross_every: int) -> list[str]:
    """Options of a folder that differ from ours and shapes do not show, as unfinished messages."""
    is_bert = "qformer_config" not in config and "hidden_act" in config
    text = (
        config if is_bert else {**_QFORMER_DEFAULTS, **config["qformer_config"]} if "qformer_config" in config else {}
    )
    tower = {**_VISION_DEFAULTS, **config["vision_config"]} if "vision_config" in config else {}
    wanted: dict[str, tuple[Any, Any]] = {
        "qformer.num_heads": (qformer.num_heads, text.get("num_attention_heads")),
        "qformer.norm_eps": (qformer.norm_eps, text.get("layer_norm_eps")),
        "qformer.activation": (qformer.activation, text.get("hidden_act")),
        "cross_every": (cross_every, text.get("cross_attention_frequency")),
        "vision.num_heads": (vision.num_heads, tower.get("num_attention_heads")),
        "vision.norm_eps": (vision.norm_eps, tower.get("layer_norm_eps")),
        "vision.activation": (vision.activation, tower.get("hidden_act")),
    }
    return [
        f"model.{name}: got {own!r}; allowed {theirs!r} with these weights"
        for name, (own, theirs) in wanted.items()
        if theirs is not None and own != theirs
    ]
