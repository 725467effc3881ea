"""Weights of BLIP's released code and of transformers' classes of BLIP under our names, and back to the latter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from omnivl.architectures.albef_names import WORDS_HEAD, ends, released_tower, shaped
from omnivl.architectures.albef_names import from_others as from_vit_or_bert
from omnivl.architectures.bert_names import GROUNDED_BLOCK
from omnivl.architectures.clip_names import image_processor
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

_WORDS, _MARK = "embed.block.text.words", "embed.block.text.mark"
_CLASS_TOKEN, _POSITIONS = "embed.block.visual.class_token", "embed.block.visual.positions"
_PATCHES = "embed.block.visual.patches"
_TOWER: Mapping[str, tuple[str, ...]] = {
    _CLASS_TOKEN: ("embeddings.class_embedding",),
    _POSITIONS: ("embeddings.position_embedding",),
    _PATCHES: ("embeddings.patch_embedding",),
    "visual_norm.block": ("post_layernorm",),
}
_TOWER_BLOCK: Mapping[str, tuple[str, ...]] = {
    "norm1": ("layer_norm1",),
    "attention.qkv": ("self_attn.qkv",),
    "attention.out": ("self_attn.projection",),
    "norm2": ("layer_norm2",),
    "ffn.fc1": ("mlp.fc1",),
    "ffn.fc2": ("mlp.fc2",),
}
_COMPARES: Mapping[str, tuple[str, ...]] = {
    "contrast.visual_projection": ("vision_proj",),
    "contrast.text_projection": ("text_proj",),
    "losses.heads.vlm.output": ("itm_head",),
}
_BERTS = {False: "text_encoder.", True: "text_decoder.bert."}
"""Where the blocks on texts stand, by whether they write."""
_HEAD = "text_decoder.cls.predictions."
_TELLING = "encoder.layer.0.crossattention.self.query.weight"
"""A name behind that of each BERT with cross-attention."""


def names(
    vision_layers: int, text_layers: int, *, writes: bool, released: bool = False
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter of ours with the parameters whose rows it concatenates.

    Args:
        vision_layers: Blocks of the image encoder.
        text_layers: Blocks on texts.
        writes: Whether they are those of ``BlipForConditionalGeneration``; else of ``BlipForImageTextRetrieval``.
        released: Whether names are the released code's, which differ in what texts do not pass.
    """
    if released:
        yield from released_tower(vision_layers)
    else:
        yield from ends(_TOWER, "", "vision_model.")
        for index in range(vision_layers):
            yield from ends(_TOWER_BLOCK, f"visual_{index:02d}.block.", f"vision_model.encoder.layers.{index}.")
        if not writes:
            yield from ends(_COMPARES)
    bert = _BERTS[writes]
    yield _WORDS, (f"{bert}embeddings.word_embeddings.weight",)
    yield "embed.block.text.positions", (f"{bert}embeddings.position_embeddings.weight",)
    yield from ends({"embed.block.text.norm": ("embeddings.LayerNorm",)}, "", bert)
    block = {_written(ours) if writes else ours: parts for ours, parts in GROUNDED_BLOCK.items()}
    for index in range(text_layers):
        yield from ends(block, f"mixed_{index:02d}.block.", f"{bert}encoder.layer.{index}.")
    if writes:
        yield from ends({**WORDS_HEAD, "decoder": ("decoder",)}, "losses.vocabulary.", _HEAD)


def _written(name: str) -> str:
    """The writers' name of a block's parameter: they have a self-attention of their own, and the norm after it."""
    part, dot, rest = name.partition(".")
    return f"{part}_written{dot}{rest}" if part in ("attention", "norm1") else name


def from_others(
    weights: Mapping[str, Tensor], path: Path, vision: Transformer, text: Transformer
) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    A different normalisation of pixels is folded into the patch embedding. The last row of the readers' word embedding
    is [ENC]'s as well.

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
    kinds = [writes for writes, bert in _BERTS.items() if bert + _TELLING in weights]
    released = "visual_encoder.cls_token" in weights
    if not kinds or not (released or "vision_model.embeddings.class_embedding" in weights):
        return None
    refuse_unmet(path, _unmet(read_json(path / "config.json") if path.is_dir() else {}, vision, text))
    rest = dict(weights)
    if (bias := rest.pop(f"{_HEAD}bias", None)) is not None:  # under both of its names, or under one
        rest.setdefault(f"{_HEAD}decoder.bias", bias)
    found: dict[str, Tensor] = {}
    for writes in kinds:
        own, _ = joined(rest, names(vision.layers, text.layers, writes=writes, released=released))
        found |= own
    for writes in kinds:
        _, rest = joined(rest, names(vision.layers, text.layers, writes=writes, released=released))
    if False in kinds:
        found[_MARK] = found[_WORDS][-1]
    return shaped(found, read_pixels(path if path.is_dir() else path.parent, CLIP_PIXELS)) | rest


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
    given = from_vit_or_bert(weights, path, vision, text, None)
    if given is None:
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        stack, _, rest = name.partition(".block.")
        if not stack.startswith("text_"):
            found[name] = tensor
            continue
        block = f"{stack.replace('text_', 'mixed_')}.block."
        part = rest.replace("norm2.", "norm3.")  # ours has cross-attention before it
        found[block + part] = found[block + _written(part)] = tensor
    return found


def to_transformers(
    sizes: Patches, vision: Transformer, text: Transformer, chain: Chain, tokens: SpecialTokens
) -> Foreign:
    """A chain of dense stacks with a head on words as ``BlipForConditionalGeneration``."""
    own = {name: tensor.detach() for name, tensor in chain.state_dict().items()}
    side = sizes.patch_size
    own[f"{_PATCHES}.weight"] = own[f"{_PATCHES}.weight"].view(vision.hidden_size, 3, side, side)
    own[_CLASS_TOKEN], own[_POSITIONS] = own[_CLASS_TOKEN][None, None], own[_POSITIONS][None]
    pairs = list(names(vision.layers, text.layers, writes=True))
    weights = divided(own, pairs)
    weights[f"{_HEAD}bias"] = own["losses.vocabulary.decoder.bias"].clone()
    marks = {"bos_token_id": tokens.decode, "sep_token_id": tokens.sep, "eos_token_id": tokens.sep}
    config: dict[str, Any] = {
        "model_type": "blip",
        "vision_config": {
            **stack_config(vision),
            **{"model_type": "blip_vision_model", "image_size": sizes.image_size, "patch_size": side},
        },
        "text_config": {
            **stack_config(text),
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


def _unmet(said: Mapping[str, Any], vision: Transformer, text: Transformer) -> Iterator[str]:
    """Options that the weights need and shapes do not show, as unfinished messages.

    Args:
        said: Content of ``config.json``; missing fields have the class's defaults. Empty: nothing is known.
        vision: Our image encoder.
        text: Our blocks on texts.
    """
    if not said:
        return
    for name, own, heads, eps, norm in (("vision", vision, 12, 1e-5, "pre"), ("text", text, 8, 1e-12, "post")):
        config = said.get(f"{name}_config", {})
        wanted = {
            "num_heads": config.get("num_attention_heads", heads),
            "activation": config.get("hidden_act", "gelu"),
            "norm_eps": config.get("layer_norm_eps", eps),
            "norm": norm,
        }
        yield from unmet(name, own, wanted)
