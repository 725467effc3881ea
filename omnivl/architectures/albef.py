"""ALBEF: an image encoder, a text encoder, and on top of the latter a stack in which texts attend to images.

Shapes: L text positions.

Source: Li et al., ALBEF, arXiv 2107.07651, section 3.1, and its released code: ViT's blocks, and BERT's: the first ones
    read a text alone, the others have cross-attention between self-attention and feed-forward layer.
Differs: the map from hidden states to words is not tied to the word embedding, token types are folded into positions,
    and the position table has ``text_length`` rows. The temperature is learnt as a logarithm. Momentum twins are
    updated after an optimizer step instead of before a forward pass; each pass sees the same weights. Negatives of
    ``vlm`` are drawn by the online embeddings of both sides; ALBEF's by online against momentum ones. ``univlc`` uses
    the keys of all replicas' batches; ALBEF only the replica's own. Its queue starts empty; ALBEF's starts with noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.albef_names import from_others
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.misfits import (
    activation_misfits,
    divisions,
    norm_misfits,
    reading_misfits,
    stack_misfits,
)
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS, TextBlock
from omnivl.parts.decoder import AlignmentBlock, GenerationBlock
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.project import Project
from omnivl.parts.sizes import MomentumConfig, Patches, Transformer, Words
from omnivl.parts.towers import EmbedTowers
from omnivl.parts.vit import VisualBlock, VisualNorm


@dataclass(frozen=True)
class AlignBeforeFuse(Architecture):
    """Base of ALBEF and of what differs in the end of the image encoder.

    The defaults are ALBEF's: ViT-B/16 at 256 pixels, and BERT-base divided into two stacks.

    Attributes:
        vision: The image encoder.
        text: The text encoder: BERT's first blocks.
        fusion: The blocks on top of it, which attend to the image: BERT's last ones, with cross-attention.
        generation_layers: Blocks of a causal decoder for generation, as wide as ``fusion``; 0 for none. If the earlier
            stage had none, they start as copies of ``fusion``'s, as ALBEF's do for question answering.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings.
        momentum: Momentum twins; None builds none.
    """

    vision: Transformer = field(default_factory=Transformer)
    text: Transformer = field(default_factory=lambda: _bert(layers=6))
    fusion: Transformer = field(default_factory=lambda: _bert(layers=6))
    generation_layers: Annotated[int, Range(0)] = 0
    image_size: Annotated[int, Range(1)] = 256
    patch_size: Annotated[int, Range(1)] = 16
    text_length: Annotated[int, Range(3)] = 25  # [CLS] word [SEP]
    vocab_size: Annotated[int, Range(1)] = 30522
    projection_size: Annotated[int, Range(1)] = 256
    momentum: MomentumConfig | None = field(default_factory=MomentumConfig)

    reads_patches: ClassVar[bool] = False
    """Whether the patches are read even where only the first position of an image is."""
    streams: ClassVar[tuple[str, ...]] = (
        *("visual", "text", "embedding", "fused", "momentum_fused", "generation", "fused_generation"),
    )
    shows: ClassVar[tuple[Visual, ...]] = ("image",)
    starts_from: ClassVar[Mapping[str, str]] = {"generation": "alignment"}

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of images and patches."""
        return Patches.of_images(self.image_size, self.patch_size, **self.shown_as)

    @property
    def words(self) -> Words:
        """Sizes of the text streams."""
        return Words(length=self.text_length, vocab_size=self.vocab_size)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths={"visual": self.vision.hidden_size} | dict.fromkeys(_ON_WORDS, self.text.hidden_size),
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The encoders, the fusion blocks and the decoder."""
        decoder = replace(self.fusion, layers=self.generation_layers)
        return {"visual": self.vision, "text": self.text, "alignment": self.fusion, "generation": decoder}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({name: getattr(self, name) for name in _STACKS})
        return {**{name: getattr(self, name) for name in _WIDTHS}, **stacks}

    def layers(self, kit: Kit) -> Layers:
        """Encoders, projections, fusion, decoder, heads."""
        patches, length, twins, stacks = self.patches, self.text_length, kit.momentum, self.stacks
        width = self.vision.hidden_size
        has_token = partial(torch.ne, other=kit.tokens.pad)
        sizes = patches, self.vision, self.words, self.text
        yield "embed", EmbedTowers(*sizes, has_token, kit.compute_dtype, momentum=twins)
        for index in range(self.vision.layers):
            may_shorten = not self.reads_patches
            encoder = VisualBlock(index, self.vision, patches, twins, block=ImageBlock, may_shorten=may_shorten)
            yield f"visual_{index:02d}", encoder
        yield "visual_norm", VisualNorm(self.vision, twins)
        yield from self.visual_end()
        for index in range(self.text.layers):
            yield f"text_{index:02d}", TextBlock(index, self.text, length, twins)
        yield "contrast", Project(self.heads, kit.objectives, self.momentum)
        yield "join", JoinRows(kit.objectives, kit.gather)
        for index in range(self.fusion.layers):
            follow = kit.momentum_of("fused")
            seen = self.seen
            block = AlignmentBlock(index, self.fusion, length, patches, memory_size=width, momentum=follow, seen=seen)
            yield f"alignment_{index:02d}", block
        for index in range(self.generation_layers):
            seen = None if kit.writes_from_texts else width
            writer = GenerationBlock(index, stacks["generation"], length, patches, memory_size=seen)
            yield f"generation_{index:02d}", writer
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings, momentum=self.momentum)

    def visual_end(self) -> Layers:
        """Further layers behind the image encoder: none."""
        return iter(())

    @property
    def seen(self) -> int | None:
        """Visual positions that fused texts look at; None: those of the image encoder."""
        return None

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of ALBEF's released code, or of what it starts from: transformers' ``ViTModel`` and ``BertModel``.

        The first blocks of a BERT become ``text``, the others ``fusion``; BERT has no cross-attention for the latter.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        return from_others(weights, path, self.vision, self.text, self.fusion)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        stacks = {name: getattr(self, name) for name in _STACKS}
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name, stack in stacks.items():
            yield from stack_misfits(name, stack)
            yield from activation_misfits(name, stack)
        yield from norm_misfits("vision", self.vision, "pre", repr(self.kind))
        if self.text.hidden_size != self.fusion.hidden_size:
            got, allowed = str(self.fusion.hidden_size), f"text.hidden_size {self.text.hidden_size}"
            yield Misfit(("fusion", "hidden_size"), got, allowed, "make them equal")
        for name in ("text", "fusion"):
            yield from reading_misfits(name, stacks[name])


@dataclass(frozen=True)
class ALBEF(AlignBeforeFuse):
    """ALBEF. The defaults are the paper's: ViT-B/16 at 256 pixels, and BERT-base divided into two stacks."""

    kind: Literal["albef"] = "albef"


_STACKS = ("vision", "text", "fusion")
_ON_WORDS = ("text", "fused", "generation")
_WIDTHS = ("patch_size", "vocab_size", "projection_size")


def _bert(layers: int) -> Transformer:
    """BERT-base with ``layers`` blocks."""
    return Transformer(layers=layers, norm="post", norm_eps=TEXT_EPS)
