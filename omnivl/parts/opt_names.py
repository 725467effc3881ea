"""OPT's weights as transformers names them, under the names of the layers of a language model here.

Source: ``transformers/models/opt/modeling_opt.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.errors import ModelError
from omnivl.parts.language import EMBED, STACK, LanguageModel

_TABLES: Mapping[str, str] = {"embed_tokens.weight": "words", "embed_positions.weight": "positions"}
_IN_BLOCKS: Mapping[str, str] = {
    "self_attn_layer_norm": "norm1",
    "self_attn.q_proj": "attention.qkv",
    "self_attn.out_proj": "attention.out",
    "final_layer_norm": "norm2",
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
}


def is_opt(weights: Mapping[str, Tensor]) -> bool:
    """Whether a folder's weights are of ``OPTModel`` or a class built on it."""
    return any(re.fullmatch(r"(?:model\.)?decoder\.layers\.0\.self_attn\.q_proj\.weight", name) for name in weights)


def language_from_opt(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ``OPTModel`` and classes built on it under the names of ``language_layers``.

    Args:
        weights: By the class's names; the output head, which is tied to the words there too, may be missing.

    Returns:
        The weights; tensors that have no place here keep their names.
    """
    given = {re.sub(r"^(?:model\.)?(?:decoder\.)?", "", name): tensor for name, tensor in weights.items()}
    given.pop("lm_head.weight", None)
    last = max((int(found[1]) for name in given if (found := re.match(r"layers\.(\d+)\.", name))), default=-1)
    made: dict[str, Tensor] = {}
    for name, tensor in given.items():
        own = _own_name(name, last)
        if ".self_attn.q_proj." in name:
            parts = [tensor, *(given[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))]
            made[own] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            made[own] = tensor
    return made


def _own_name(name: str, last: int) -> str:
    if name in _TABLES:
        return f"{EMBED}.block.{_TABLES[name]}"
    if found := re.fullmatch(r"final_layer_norm\.(weight|bias)", name):
        return f"{STACK}_{last:02d}.block.norm_out.{found[1]}"
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found and found[2] in _IN_BLOCKS:
        return f"{STACK}_{int(found[1]):02d}.block.{_IN_BLOCKS[found[2]]}.{found[3]}"
    return name


def refuse_options_of_opt(said: Mapping[str, Any], language: LanguageModel, path: Path) -> None:
    """Refuses weights whose configuration differs from ours in an option that shapes do not show.

    Args:
        said: Content of ``config.json`` of the folder.
        language: Our configuration.
        path: The folder, for messages.

    Raises:
        ModelError: The class computes something else.
    """
    blocks = language.blocks
    wanted: Mapping[str, tuple[object, object]] = {
        "num_heads": (blocks.num_heads, said.get("num_attention_heads", blocks.num_heads)),
        "activation": (blocks.activation, said.get("activation_function", blocks.activation)),
        "norm_eps": (blocks.norm_eps, 1e-5),
        "norm": (blocks.norm, "pre" if said.get("do_layer_norm_before", True) else "post"),
        "layers": (blocks.layers, said.get("num_hidden_layers", blocks.layers)),
    }
    for name, (own, theirs) in wanted.items():
        if own != theirs:
            raise ModelError(
                f"{path}: model.{STACK}.blocks.{name}: got {own!r}; allowed {theirs!r} with these weights; set it, or "
                "give other weights"
            )
    width, inner = said.get("hidden_size", blocks.hidden_size), said.get("word_embed_proj_dim")
    if inner not in (None, width):
        raise ModelError(
            f"{path}: got a language model with words of width {inner} in a model of width {width}; allowed is one "
            "width; give other weights, such as those of OPT-125M"
        )
