"""Weights of BLIP's released code and of transformers' classes of BLIP under our names, and back to the latter."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.architectures.albef_names import from_others as from_vit_or_bert
from omnivl.architectures.clip_names import image_processor
from omnivl.architectures.foreign import CLIP_PIXELS, OUR_PIXELS, Foreign, fold_pixels, read_json, read_pixels
from omnivl.chain.chain import Chain
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.parts.sizes import Patches, Transformer

Names = Iterator[tuple[str, tuple[str, ...]]]
"""A parameter of ours, and the parameters of the class whose rows it concatenates."""

_PATCHES, _WORDS = "embed.block.visual.patches", "embed.block.text.words"
_MARK = "embed.block.text.mark"
_TABLES = {
    "embed.block.visual.class_token": "vision_model.embeddings.class_embedding",
    "embed.block.visual.positions": "vision_model.embeddings.position_embedding",
}
_TOWER = {
    _PATCHES: "vision_model.embeddings.patch_embedding",
    "visual_norm.block": "vision_model.post_layernorm",
    "contrast.visual_projection": "vision_proj",
    "contrast.text_projection": "text_proj",
    "losses.heads.vlm.output": "itm_head",
}
_TOWER_BLOCK = {
    "norm1": "layer_norm1",
    "attention.qkv": "self_attn.qkv",
    "attention.out": "self_attn.projection",
    "norm2": "layer_norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}
_SHARED = {
    "cross.q": ("crossattention.self.query",),
    "cross.kv": ("crossattention.self.key", "crossattention.self.value"),
    "cross.out": ("crossattention.output.dense",),
    "norm2": ("crossattention.output.LayerNorm",),
    "ffn.fc1": ("intermediate.dense",),
    "ffn.fc2": ("output.dense",),
    "norm3": ("output.LayerNorm",),
}
_HEAD = {"transform": "transform.dense", "norm": "transform.LayerNorm", "decoder": "decoder"}


def _own(suffix: str) -> dict[str, tuple[str, ...]]:
    """Self-attention, which readers and writers have each: our names end with ``suffix``."""
    return {
        f"attention{suffix}.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
        f"attention{suffix}.out": ("attention.output.dense",),
        f"norm1{suffix}": ("attention.output.LayerNorm",),
    }


def names(vision_layers: int, text_layers: int, *, writes: bool) -> Names:
    """Each parameter of ours with those of ``BlipForImageTextRetrieval``, or of ``BlipForConditionalGeneration``.

    Args:
        vision_layers: Blocks of the image encoder.
        text_layers: Blocks on texts.
        writes: Which class: the second.
    """
    yield from ((ours, (theirs,)) for ours, theirs in _TABLES.items())
    bert = "text_decoder.bert." if writes else "text_encoder."
    yield _WORDS, (f"{bert}embeddings.word_embeddings.weight",)
    yield "embed.block.text.positions", (f"{bert}embeddings.position_embeddings.weight",)
    maps: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _TOWER.items()}
    for index in range(vision_layers):
        for ours, one in _TOWER_BLOCK.items():
            maps[f"visual_{index:02d}.block.{ours}"] = (f"vision_model.encoder.layers.{index}.{one}",)
    maps["embed.block.text.norm"] = (f"{bert}embeddings.LayerNorm",)
    for index in range(text_layers):
        for ours, parts in (_own("_written" if writes else "") | _SHARED).items():
            maps[f"mixed_{index:02d}.block.{ours}"] = tuple(f"{bert}encoder.layer.{index}.{part}" for part in parts)
    if writes:
        maps |= {f"losses.vocabulary.{ours}": (f"text_decoder.cls.predictions.{one}",) for ours, one in _HEAD.items()}
    for ours, parts in maps.items():
        for ending in ("weight", "bias"):
            yield f"{ours}.{ending}", tuple(f"{part}.{ending}" for part in parts)


def from_others(
    weights: Mapping[str, Tensor], path: Path, vision: Transformer, text: Transformer
) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    Args:
        weights: By the names of a class, or of the released code.
        path: The folder or file.
        vision: Our image encoder.
        text: Our blocks on texts.

    Returns:
        None if the weights are of none of them.

    Raises:
        ModelError: Options of ours compute something else.
    """
    given = _as_transformers(weights) if "visual_encoder.cls_token" in weights else dict(weights)
    berts = {False: "text_encoder.", True: "text_decoder.bert."}
    kinds = [writes for writes, bert in berts.items() if f"{bert}{_TOLD}" in given]
    if not kinds or "vision_model.embeddings.class_embedding" not in given:
        return None
    said = read_json(path / "config.json") if path.is_dir() else {}
    if unmet := list(_unmet(said, vision, text)):
        raise ModelError("\n".join(f"{path}: {line}; set it, or give other weights" for line in unmet))
    head = "text_decoder.cls.predictions."
    if True in kinds:  # tied there, so that files may lack them
        given.setdefault(f"{head}decoder.weight", given[f"{berts[True]}embeddings.word_embeddings.weight"])
        if f"{head}bias" in given:
            bias = given.pop(f"{head}bias")
            given.setdefault(f"{head}decoder.bias", bias)
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for writes in kinds:
        for ours, parts in names(vision.layers, text.layers, writes=writes):
            if all(part in given for part in parts):
                found[ours] = torch.cat([given[part] for part in parts]) if len(parts) > 1 else given[parts[0]]
                taken.update(parts)
    if "temp" in given:
        found["contrast.logit_scale"] = -given["temp"].log().reshape(1)
        taken.add("temp")
    for name in _TABLES:
        if name in found:
            found[name] = found[name].flatten(0, -2) if name.endswith("positions") else found[name].flatten()
    if False in kinds:
        found[_MARK] = found[_WORDS][-1]
    weight, bias = found[f"{_PATCHES}.weight"].flatten(1), found[f"{_PATCHES}.bias"]
    pixels = read_pixels(path if path.is_dir() else path.parent, CLIP_PIXELS)
    folded = (weight, bias) if pixels == OUR_PIXELS else fold_pixels(weight, bias, pixels)
    found[f"{_PATCHES}.weight"], found[f"{_PATCHES}.bias"] = folded
    return found | {name: tensor for name, tensor in given.items() if name not in taken}


def from_starts(
    weights: Mapping[str, Tensor], path: Path, vision: Transformer, text: Transformer
) -> dict[str, Tensor] | None:
    """Weights of what BLIP starts from: transformers' ``ViTModel``, or ``BertModel`` for readers and writers both.

    Args:
        weights: By the class's names.
        path: The folder or file.
        vision: Our image encoder.
        text: Our blocks on texts. Cross-attention, which BERT lacks, gets none.

    Returns:
        None if the weights are of neither class.

    Raises:
        ModelError: Options of ours compute something else.
    """
    if any(name.startswith("visual_encoder.") for name in weights):
        return None
    given = from_vit_or_bert(weights, path, vision, text, replace(text, layers=0))
    if given is None:
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        stack, _, rest = name.partition(".block.")
        if not stack.startswith("text_"):
            found[name] = tensor
            continue
        block = f"{stack.replace('text_', 'mixed_')}.block."
        part, dot, ending = rest.partition(".")
        found[block + ("norm3" if part == "norm2" else part) + dot + ending] = tensor
        if part in ("attention", "norm1"):
            found[f"{block}{part}_written{dot}{ending}"] = tensor
    return found


def _as_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of the released code by the names of transformers' classes; other tensors keep theirs."""
    return {_renamed(name): tensor for name, tensor in weights.items()}


def _renamed(name: str) -> str:
    if not name.startswith("visual_encoder."):
        return name
    rest = name.removeprefix("visual_encoder.")
    if not rest.startswith("blocks."):
        stem = next((one for one in _RELEASED if rest == one or rest.startswith(f"{one}.")), None)
        return name if stem is None else _RELEASED[stem] + rest.removeprefix(stem)
    _, index, part = rest.split(".", 2)
    stem, _, ending = part.rpartition(".")
    return f"vision_model.encoder.layers.{index}.{_RELEASED_BLOCK.get(stem, stem)}.{ending}"


_RELEASED = {
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding",
    "patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "norm": "vision_model.post_layernorm",
}
_RELEASED_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
}
_TOLD = "encoder.layer.0.crossattention.self.query.weight"


def to_transformers(
    sizes: Patches, vision: Transformer, text: Transformer, chain: Chain, tokens: SpecialTokens
) -> Foreign:
    """A chain of dense stacks with a head on words as ``BlipForConditionalGeneration``."""
    own = {name: tensor.detach() for name, tensor in chain.state_dict().items()}
    pairs = [pair for pair in names(vision.layers, text.layers, writes=True) if pair[0] not in _UNPLACED]
    own[f"{_PATCHES}.weight"] = own[f"{_PATCHES}.weight"].view(
        vision.hidden_size, 3, sizes.patch_size, sizes.patch_size
    )
    own["embed.block.visual.class_token"] = own["embed.block.visual.class_token"][None, None]
    own["embed.block.visual.positions"] = own["embed.block.visual.positions"][None]
    weights: dict[str, Tensor] = {}
    for ours, parts in pairs:
        pieces = own[ours].chunk(len(parts)) if len(parts) > 1 else (own[ours],)
        weights |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    weights["text_decoder.cls.predictions.bias"] = own["losses.vocabulary.decoder.bias"].clone()
    marks = {"bos_token_id": tokens.decode, "sep_token_id": tokens.sep, "eos_token_id": tokens.sep}
    config: dict[str, Any] = {
        "model_type": "blip",
        "vision_config": {
            **_stack_config(vision),
            **{"model_type": "blip_vision_model", "image_size": sizes.image_size, "patch_size": sizes.patch_size},
        },
        "text_config": {
            **_stack_config(text),
            **{"model_type": "blip_text_model", "vocab_size": len(own[_WORDS]), "is_decoder": True},
            **{"max_position_embeddings": len(own["embed.block.text.positions"]), "pad_token_id": tokens.pad},
            **{"hidden_dropout_prob": text.dropout, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": False},
            **{"encoder_hidden_size": vision.hidden_size, **marks},
        },
        "tie_word_embeddings": False,
    }
    placed = {ours for ours, _ in pairs}
    left = tuple(name for name, _ in chain.named_parameters() if name not in placed)
    return Foreign("BlipForConditionalGeneration", config, weights, image_processor(sizes.image_size), left)


_UNPLACED = {
    f"{ours}.{ending}"
    for ours in ("contrast.visual_projection", "contrast.text_projection", "losses.heads.vlm.output")
    for ending in ("weight", "bias")
}


def _stack_config(stack: Transformer) -> dict[str, Any]:
    return {
        "hidden_size": stack.hidden_size,
        "intermediate_size": stack.inner_size,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.num_heads,
        "hidden_act": stack.activation,
        "layer_norm_eps": stack.norm_eps,
    }


def _unmet(said: Mapping[str, Any], vision: Transformer, text: Transformer) -> Iterator[str]:
    """Options that the weights need and shapes do not show, as unfinished messages; none if nothing is known."""
    if not said:
        return
    given = {
        "vision": (vision, said.get("vision_config", {}), {"num_heads": 12, "norm_eps": 1e-5, "norm": "pre"}),
        "text": (text, said.get("text_config", {}), {"num_heads": 8, "norm_eps": 1e-12, "norm": "post"}),
    }
    for name, (own, config, usual) in given.items():
        wanted = {
            "num_heads": config.get("num_attention_heads", usual["num_heads"]),
            "activation": config.get("hidden_act", "gelu"),
            "norm_eps": config.get("layer_norm_eps", usual["norm_eps"]),
            "norm": usual["norm"],
        }
        for option, value in wanted.items():
            if (got := getattr(own, option)) != value:
                yield f"model.{name}.{option}: got {got!r}; allowed {value!r} with these weights"
