"""METER: an image encoder, a text encoder, and a fusion of both by co-attention or by merged attention.

Source: Dou et al., METER, arXiv 2111.02387, and its released code: CLIP's image tower without its last block and
    RoBERTa, of both all positions; linear maps and an embedding of the modality; blocks with self-attention,
    cross-attention to the other modality and a feed-forward layer; two poolers, whose results lie end to end. The
    released code has co-attention alone; merged attention is the paper's, figure 2 (b).
Differs: no dropout of attention's weights. Positions of RoBERTa count from 0, its token type is folded into them, and
    the table has ``text_length`` rows. Images of a step are of one square size. No class of ``transformers`` is METER
    (its BridgeTower links every block of the fusion to one of the encoders), so that it is not exported as one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.albef_names import from_others
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.clip_names import tower_from_clip
from omnivl.architectures.misfits import (
    activation_misfits,
    dense_misfits,
    divisions,
    norm_misfits,
    reading_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS, TextBlock
from omnivl.parts.flava import JoinOutputs
from omnivl.parts.losses import Losses
from omnivl.parts.meter import FusionLayer, MapOutputs, PoolBoth
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.towers import EmbedTowers
from omnivl.parts.vit import VisualBlock, VisualNorm

ROBERTA_EPS = 1e-5


def _clip() -> Transformer:
    return Transformer(layers=11, norm_eps=CLIP_EPS, activation="quick_gelu")


def _bert(layers: int, eps: float) -> Transformer:
    return Transformer(layers=layers, norm="post", norm_eps=eps, dropout=0.1)


@dataclass(frozen=True)
class METER(Architecture):
    """METER. The defaults are the paper's best: CLIP-ViT-B/16, RoBERTa-base, six blocks of co-attention.

    Attributes:
        vision: The image encoder: CLIP's image tower without its last block.
        text: The text encoder.
        fusion: The blocks on top of both. A block of co-attention has about 2.7 times the weights of one of merged
            attention; the paper compares 6 of the former with 12 of the latter.
        attention: ``co``: each modality has blocks of its own, which attend to the other one. ``merged``: one block
            attends to the positions of both.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
    """

    kind: Literal["meter"] = "meter"
    vision: Transformer = field(default_factory=_clip)
    text: Transformer = field(default_factory=lambda: _bert(12, ROBERTA_EPS))
    fusion: Transformer = field(default_factory=lambda: _bert(6, TEXT_EPS))
    attention: Literal["co", "merged"] = "co"
    image_size: Annotated[int, Range(1)] = 288
    patch_size: Annotated[int, Range(1)] = 16
    text_length: Annotated[int, Range(3)] = 50  # start, a word, end
    vocab_size: Annotated[int, Range(1)] = 50265

    streams: ClassVar[tuple[str, ...]] = ("visual", "masked_visual", "fused", "fused_visual")
    shows: ClassVar[tuple[Visual, ...]] = ("image",)

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of images and patches."""
        return Patches.of_images(self.image_size, self.patch_size, norm_embeddings=True, **self.shown_as)

    @property
    def words(self) -> Words:
        """Sizes of the text stream."""
        return Words(length=self.text_length, vocab_size=self.vocab_size)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads; a fused row as a whole is a text and an image."""
        size = self.fusion.hidden_size
        return HeadSizes(
            widths={"visual": self.vision.hidden_size, "fused": size, "fused_visual": size, "pooled": 2 * size},
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=0,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The encoders and the fusion."""
        return {"visual": self.vision, "text": self.text, "fused": self.fusion}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({name: getattr(self, name) for name in _STACKS})
        return {**{name: getattr(self, name) for name in _WIDTHS}, **stacks}

    def layers(self, kit: Kit) -> Layers:
        """Encoders, maps, fusion, heads."""
        vision, text, fusion, length, patches = self.vision, self.text, self.fusion, self.text_length, self.patches
        towers = patches, vision, self.words, text, partial(torch.ne, other=kit.tokens.pad), kit.compute_dtype
        yield "embed", EmbedTowers(*towers, bias=False, masks=True)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, block=ImageBlock)
        yield "visual_norm", VisualNorm(vision)
        for index in range(text.layers):
            yield f"text_{index:02d}", TextBlock(index, text, length)
        yield "encoded", MapOutputs(vision, text, fusion, length, patches)
        yield "join", JoinOutputs(kit.objectives, kit.gather, concatenates=True)
        for index in range(fusion.layers):
            merged = self.attention == "merged"
            yield f"fused_{index:02d}", FusionLayer(index, fusion, length, patches, merged=merged)
        yield "fused_pool", PoolBoth(fusion)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights that METER starts from: an image tower of CLIP, or a text encoder.

        These are transformers' ``CLIPModel`` or ``CLIPVisionModel``, and ``RobertaModel`` or ``BertModel`` or a class
        built on it.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        if (tower := tower_from_clip(weights, path, self.vision)) is not None:
            return tower
        reads = any(name.endswith("embeddings.word_embeddings.weight") for name in weights)
        return from_others(weights, path, self.vision, self.text, None) if reads else None

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name in _STACKS:
            stack = getattr(self, name)
            yield from stack_misfits(name, stack)
            yield from activation_misfits(name, stack)
        where = repr(self.kind)
        yield from norm_misfits("vision", self.vision, "pre", where)
        yield from norm_misfits("fusion", self.fusion, "post", where)
        yield from dense_misfits("fusion", self.fusion, where, "; vision and text may have experts")
        for name in ("text", "fusion"):
            yield from reading_misfits(name, getattr(self, name))
        yield from twin_misfits(self.kind, self.momentum)


_STACKS = ("vision", "text", "fusion")
_WIDTHS = ("patch_size", "vocab_size", "attention")
