"""Weights of ALBEF's released code, of ViT and of BERT under our names.

Shapes: D hidden size.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from omnivl.architectures.bert_names import GROUNDED_BLOCK, TEXT_BLOCK
from omnivl.architectures.foreign import (
    CLIP_PIXELS,
    OUR_PIXELS,
    Pixels,
    fold_pixels,
    joined,
    read_json,
    read_pixels,
    refuse_unmet,
    unmet,
)
from omnivl.parts.sizes import Transformer

_PATCHES, _WORDS, _POSITIONS = "embed.block.visual.patches", "embed.block.text.words", "embed.block.text.positions"
_VISUAL_POSITIONS = "embed.block.visual.positions"
_TABLES = ("embed.block.visual.class_token", _VISUAL_POSITIONS)
_ROBERTAS = ("roberta", "xlm-roberta")
_ROBERTA_PAD = 1
_TYPES = "embeddings.token_type_embeddings.weight"
_PREFIX = re.compile(r"^(?:bert|vit|roberta)\.")


def from_others(
    weights: Mapping[str, Tensor], path: Path, vision: Transformer, text: Transformer, fusion: Transformer | None
) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    A different normalisation of pixels is folded into the patch embedding, and the first token type into the positions.

    Args:
        weights: By the folder's names.
        path: The folder, or the file.
        vision: Our image encoder.
        text: Our text encoder.
        fusion: The blocks on top of it, which a BERT's last ones become; None: all become ``text``.

    Returns:
        None if the weights are of none of ALBEF, ViT, BERT and RoBERTa.

    Raises:
        ModelError: See ``_refuse_options``.
    """
    given = {_PREFIX.sub("", name): tensor for name, tensor in weights.items()}
    kind, bert = "", ""
    if "visual_encoder.cls_token" in given and "text_encoder.bert.embeddings.word_embeddings.weight" in given:
        kind, bert = "albef", "text_encoder.bert."
    elif "embeddings.word_embeddings.weight" in given:
        kind = "bert"
    elif "embeddings.cls_token" in given:
        kind = "vit"
    said = read_json(path / "config.json") if path.is_dir() else {}
    if kind == "bert" and (said.get("model_type") in _ROBERTAS or "lm_head.dense.weight" in given):
        first = 1 + said.get("pad_token_id", _ROBERTA_PAD)  # positions before it are of no word
        given, said = _as_bert(given, first), said | {"model_type": kind}
    if not kind or said.get("model_type", kind) != kind:
        return None
    layers = 0 if fusion is None else fusion.layers
    readers = {"text": text} | ({} if fusion is None or not layers else {"fusion": fusion})
    _refuse_options(said, path, {"vit": {"vision": vision}, "bert": readers}.get(kind, {}))
    found, rest = joined(given, _names(kind, bert, vision.layers, text.layers, layers))
    if _POSITIONS in found and (types := rest.pop(bert + _TYPES, None)) is not None:
        found[_POSITIONS] = found[_POSITIONS] + types[0]
    usual = CLIP_PIXELS if kind == "albef" else OUR_PIXELS
    return shaped(found, read_pixels(path, usual) if path.is_dir() else usual) | rest


def _as_bert(given: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """RoBERTa's tensors under BERT's names, with the positions from ``first`` on."""
    found = dict[str, Tensor]()
    for name, tensor in given.items():
        if name.startswith("lm_head."):
            name = name.replace("lm_head.dense.", "cls.predictions.transform.dense.")
            name = name.replace("lm_head.layer_norm.", "cls.predictions.transform.LayerNorm.")
            name = name.replace("lm_head.decoder.", "cls.predictions.decoder.").replace("lm_head.", "cls.predictions.")
        found[name] = tensor[first:] if name == "embeddings.position_embeddings.weight" else tensor
    return found


def shaped(found: dict[str, Tensor], pixels: Pixels) -> dict[str, Tensor]:
    """Converts shapes: tables without batch dimension, the convolution as a matrix, the temperature as log(1 / t)."""
    for name in _TABLES:
        if name in found:
            found[name] = found[name].flatten(0, -2) if name == _VISUAL_POSITIONS else found[name].flatten()
    if f"{_PATCHES}.weight" in found:
        weight, bias = found[f"{_PATCHES}.weight"].flatten(1), found[f"{_PATCHES}.bias"]
        folded = (weight, bias) if pixels == OUR_PIXELS else fold_pixels(weight, bias, pixels)
        found[f"{_PATCHES}.weight"], found[f"{_PATCHES}.bias"] = folded
    if "contrast.logit_scale" in found:
        found["contrast.logit_scale"] = -found["contrast.logit_scale"].log().reshape(1)
    if "losses.vocabulary.transform.weight" in found and _WORDS in found:
        # There the last map is tied to the word embedding, and may be missing in the file.
        found.setdefault("losses.vocabulary.decoder.weight", found[_WORDS])
    return found


def _names(
    kind: str, bert: str, vision_layers: int, text_layers: int, fusion_layers: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The parameters of a checkpoint of a kind; names of its BERT begin with ``bert``."""
    if kind == "albef":
        yield from released_tower(vision_layers)
    if kind == "vit":
        yield from ends(_VIT)
        for index in range(vision_layers):
            yield from ends(_VIT_BLOCK, f"visual_{index:02d}.block.", f"encoder.layer.{index}.")
        return
    yield _WORDS, (f"{bert}embeddings.word_embeddings.weight",)
    yield _POSITIONS, (f"{bert}embeddings.position_embeddings.weight",)
    yield from ends({"embed.block.text.norm": ("embeddings.LayerNorm",)}, "", bert)
    for index in range(text_layers + fusion_layers):
        fuses = index >= text_layers
        ours = f"alignment_{index - text_layers:02d}" if fuses else f"text_{index:02d}"
        parts = GROUNDED_BLOCK if fuses else TEXT_BLOCK
        yield from ends(parts, f"{ours}.block.", f"{bert}encoder.layer.{index}.")
    head = bert.removesuffix("bert.") + "cls.predictions."
    yield from ends(WORDS_HEAD, "losses.vocabulary.", head)
    yield "losses.vocabulary.decoder.weight", (f"{head}decoder.weight",)
    yield "losses.vocabulary.decoder.bias", (f"{head}bias",)


def released_tower(layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The image encoder, projections, temperature and matching head in files of ALBEF's and BLIP's released code."""
    yield from ends(_TIMM)
    for index in range(layers):
        yield from ends(_TIMM_BLOCK, f"visual_{index:02d}.block.", f"visual_encoder.blocks.{index}.")
    yield "contrast.logit_scale", ("temp",)


def ends(
    parts: Mapping[str, tuple[str, ...]], ours: str = "", theirs: str = ""
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Weights and biases of linear maps and norms; tables as they are."""
    for name, others in parts.items():
        for end in ("",) if name in _TABLES else (".weight", ".bias"):
            yield f"{ours}{name}{end}", tuple(f"{theirs}{other}{end}" for other in others)


def _refuse_options(said: Mapping[str, object], path: Path, stacks: Mapping[str, Transformer]) -> None:
    """Refuses weights whose configuration or kind differs from ours in an option that shapes do not show.

    Raises:
        ModelError: One line for each.
    """
    lines: list[str] = []
    for name, own in stacks.items():
        wanted = {
            "num_heads": said.get("num_attention_heads", own.num_heads),
            "activation": said.get("hidden_act", own.activation),
            "norm": "pre" if name == "vision" else "post",
        }
        lines += unmet(name, own, wanted)
    refuse_unmet(path, lines)


_TIMM: Mapping[str, tuple[str, ...]] = {
    "embed.block.visual.class_token": ("visual_encoder.cls_token",),
    _VISUAL_POSITIONS: ("visual_encoder.pos_embed",),
    _PATCHES: ("visual_encoder.patch_embed.proj",),
    "visual_norm.block": ("visual_encoder.norm",),
    "contrast.visual_projection": ("vision_proj",),
    "contrast.text_projection": ("text_proj",),
    "losses.heads.vlm.output": ("itm_head",),
}
_TIMM_BLOCK: Mapping[str, tuple[str, ...]] = {
    "norm1": ("norm1",),
    "attention.qkv": ("attn.qkv",),
    "attention.out": ("attn.proj",),
    "norm2": ("norm2",),
    "ffn.fc1": ("mlp.fc1",),
    "ffn.fc2": ("mlp.fc2",),
}
_VIT: Mapping[str, tuple[str, ...]] = {
    "embed.block.visual.class_token": ("embeddings.cls_token",),
    _VISUAL_POSITIONS: ("embeddings.position_embeddings",),
    _PATCHES: ("embeddings.patch_embeddings.projection",),
    "visual_norm.block": ("layernorm",),
}
_VIT_BLOCK: Mapping[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before",),
    "attention.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attention.out": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "ffn.fc1": ("intermediate.dense",),
    "ffn.fc2": ("output.dense",),
}
WORDS_HEAD: Mapping[str, tuple[str, ...]] = {"transform": ("transform.dense",), "norm": ("transform.LayerNorm",)}
