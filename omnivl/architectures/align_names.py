"""ALIGN's weights under our names and those of transformers' ``AlignModel``, in both directions.

Shapes: D hidden size, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import DenseConfig
from omnivl.architectures.bert_names import TEXT_BLOCK
from omnivl.architectures.clip_names import image_processor
from omnivl.architectures.foreign import OUR_PIXELS, Foreign, joined, read_json, read_pixels, stack_config
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.parts.efficientnet import Convolved, EfficientNet
from omnivl.parts.project import Project
from omnivl.parts.sizes import Transformer

Names = Iterator[tuple[str, tuple[str, ...]]]
"""A tensor of ours, and the tensors of ``AlignModel`` whose rows it concatenates."""

_POSITIONS, _SCALE = "embed.block.text.positions", "contrast.logit_scale"
_TYPES = "text_model.embeddings.token_type_embeddings.weight"
_NORM = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
_MAPS = {"embed.block.text.norm": "text_model.embeddings.LayerNorm", "contrast.text_projection": "text_projection"}
_CONVOLUTIONS = {"convolution": "depthwise_conv.depthwise_conv", "expand": "expansion.expand_conv"} | {
    "project": "projection.project_conv"
}
_NORMS = {
    "expand_norm": "expansion.expand_bn",
    "convolution_norm": "depthwise_conv.depthwise_norm",
    "project_norm": "projection.project_bn",
}
_GATES = {"squeeze": "squeeze_excite.reduce", "excite": "squeeze_excite.expand"}


def _names(blocks: Sequence[Convolved], text_layers: int) -> Names:
    """All tensors of ours, buffers included."""
    yield "embed.block.visual.convolution.weight", ("vision_model.embeddings.convolution.weight",)
    for own, other in _NORM.items():
        yield f"embed.block.visual.norm.{own}", (f"vision_model.embeddings.batchnorm.{other}",)
    for index, block in enumerate(blocks):
        ours, theirs = f"visual_{index:02d}.block", f"vision_model.encoder.blocks.{index}"
        expands = block.expansion > 1
        for own, other in _CONVOLUTIONS.items():
            if own != "expand" or expands:
                yield f"{ours}.{own}.weight", (f"{theirs}.{other}.weight",)
        for norm, other in _NORMS.items():
            if norm != "expand_norm" or expands:
                for own, end in _NORM.items():
                    yield f"{ours}.{norm}.{own}", (f"{theirs}.{other}.{end}",)
        for own, other in _GATES.items():
            for end in ("weight", "bias"):
                yield f"{ours}.{own}.{end}", (f"{theirs}.{other}.{end}",)
    yield "embed.block.text.words", ("text_model.embeddings.word_embeddings.weight",)
    yield _POSITIONS, ("text_model.embeddings.position_embeddings.weight",)
    yield _SCALE, ("temperature",)
    joint: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _MAPS.items()}
    for index in range(text_layers):
        for part, others in TEXT_BLOCK.items():
            joint[f"text_{index:02d}.block.{part}"] = tuple(
                f"text_model.encoder.layer.{index}.{other}" for other in others
            )
    for ours, parts in joint.items():
        for end in ("weight", "bias"):
            yield f"{ours}.{end}", tuple(f"{part}.{end}" for part in parts)


def from_transformers(
    weights: Mapping[str, Tensor], path: Path, blocks: Sequence[Convolved], text_layers: int
) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    Convolutions of one pixel become matrices, and the first token type is folded into the positions.

    Args:
        weights: By the folder's names.
        path: The folder, or the file.
        blocks: Of our image encoder.
        text_layers: Blocks of our text encoder.

    Raises:
        ModelError: Pixels are normalised otherwise: padding would not be what it was there.
    """
    if path.is_dir() and (pixels := read_pixels(path, OUR_PIXELS)) != OUR_PIXELS:
        raise ModelError(
            f"{path}: got pixels normalised by mean {pixels.mean} and deviation {pixels.std}; allowed are 0.5 and 0.5, "
            "since convolutions pad with zeros; give other weights"
        )
    found, rest = joined(weights, _names(blocks, text_layers))
    if _POSITIONS in found and (types := rest.pop(_TYPES, None)) is not None:
        found[_POSITIONS] = found[_POSITIONS] + types[0]
    for name, tensor in found.items():
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
            found[name] = tensor.flatten(1)
    if _SCALE in found:
        found[_SCALE] = -found[_SCALE].log().reshape(1)
    return found | {name: tensor for name, tensor in rest.items() if not name.endswith(".num_batches_tracked")}


def to_transformers(
    sizes: HeadSizes, image_size: int, vision: EfficientNet, text: Transformer, chain: Chain, tokens: SpecialTokens
) -> Foreign:
    """A chain as ``AlignModel``. The pooler of texts, which no loss of ALIGN reads, is the identity."""
    own = {name: tensor.detach() for name, tensor in chain.state_dict().items()}
    project = chain.get_submodule("contrast")
    assert isinstance(project, Project)
    own[_SCALE] = project.scale().detach().reciprocal()
    blocks, weights = vision.blocks(image_size), dict[str, Tensor]()
    for ours, parts in _names(blocks, text.layers):
        pieces = own[ours].chunk(len(parts)) if len(parts) > 1 else (own[ours],)
        for part, piece in zip(parts, pieces, strict=True):
            is_pixel = part.startswith("vision_model.") and piece.dim() == 2
            weights[part] = (piece[..., None, None] if is_pixel else piece).clone()
            if part.endswith(".running_var"):
                weights[part.replace("running_var", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
    weights[_TYPES] = torch.zeros(2, text.hidden_size)
    weights["text_model.pooler.dense.weight"] = torch.eye(text.hidden_size)
    weights["text_model.pooler.dense.bias"] = torch.zeros(text.hidden_size)
    config = {
        "model_type": "align",
        "projection_dim": sizes.projection_size,
        "vision_config": {
            "image_size": image_size,
            "width_coefficient": vision.width,
            "depth_coefficient": vision.depth,
            "hidden_dim": sizes.projection_size,
            "batch_norm_eps": vision.norm_eps,
            "batch_norm_momentum": 1.0 - vision.norm_decay,
            "drop_connect_rate": vision.drop_path,
            "depthwise_padding": odd_sides(blocks),
        },
        "text_config": {
            **stack_config(text),
            "hidden_dropout_prob": text.dropout,
            **{"vocab_size": sizes.vocab_size, "max_position_embeddings": sizes.text_length},
            "pad_token_id": tokens.pad,
        },
    }
    heads = tuple(name for name, _ in chain.named_parameters() if name.startswith("losses."))
    return Foreign("AlignModel", config, weights, image_processor(image_size), heads)


def odd_sides(blocks: Sequence[Convolved]) -> list[int]:
    """Indices of the blocks with a stride whose input has an odd side, which are padded on both ends alike."""
    return [index for index, block in enumerate(blocks) if block.stride > 1 and block.side % 2]


def refuse_shape(text: Transformer, image_size: int) -> None:
    """Refuses a model that ``AlignModel`` does not compute.

    Raises:
        ModelError: The text encoder has experts or normalises before its branches, or the image's side is odd.
    """
    if not isinstance(text.ffn, DenseConfig) or text.norm != "post":
        raise ModelError(
            f"model.text: got {text.ffn.kind!r} feed-forward layers and norm {text.norm!r}; allowed are 'dense' ones "
            "and 'post' for transformers' AlignModel; leave --format out"
        )
    if image_size % 2:
        raise ModelError(
            f"model.image_size: got {image_size}; allowed is an even number for transformers' AlignModel, which pads "
            "images of odd sides otherwise; leave --format out"
        )


def refuse_options(path: Path, vision: EfficientNet, text: Transformer) -> None:
    """Refuses a folder whose configuration differs from ours in an option that shapes do not show.

    Raises:
        ModelError: One line for each.
    """
    config: dict[str, Any] = read_json(path / "config.json") if path.is_dir() else {}
    if not config:
        return
    seen, said = config.get("vision_config", {}), config.get("text_config", {})
    wanted = {
        "vision.norm_eps": (vision.norm_eps, seen.get("batch_norm_eps", 1e-3)),
        "text.num_heads": (text.num_heads, said.get("num_attention_heads", 12)),
        "text.activation": (text.activation, said.get("hidden_act", "gelu")),
        "text.norm_eps": (text.norm_eps, said.get("layer_norm_eps", 1e-12)),
        "text.norm": (text.norm, "post"),
    }
    lines = [
        f"{path}: model.{option}: got {got!r}; allowed {value!r} with these weights; set it, or give other weights"
        for option, (got, value) in wanted.items()
        if got != value
    ]
    if lines:
        raise ModelError("\n".join(lines))
