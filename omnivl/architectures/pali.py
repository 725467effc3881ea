"""PaLI: a ViT whose patches go before a prompt's words into the encoder of mT5, whose decoder writes the answer.

Source: Chen et al., PaLI, arXiv 2209.06794, section 3.1. Its code is not released; the layers of encoder and decoder
    are those of transformers' ``T5ForConditionalGeneration`` (``omnivl.parts.t5``), with which losses and gradients
    agree.
Differs: the image encoder has a class token, which the text encoder does not see. Prompts begin with a start token, and
    the decoder with that of generated texts instead of the padding token. Texts without images are not learnt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.albef_names import from_others as from_vit
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.misfits import (
    activation_misfits,
    dense_misfits,
    divisions,
    native_misfits,
    norm_misfits,
    reading_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.architectures.t5_names import from_transformers
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.t5 import EmbedT5, MapPatches, T5DecoderLayer, T5EncoderLayer, T5EncoderNorm
from omnivl.parts.vit import VisualBlock, VisualNorm


def _vit(width: int, inner: int, heads: int, layers: int) -> Transformer:
    return Transformer(hidden_size=width, num_heads=heads, layers=layers, mlp_ratio=inner / width)


def _mt5(width: int, inner: int, heads: int, layers: int) -> Transformer:
    return Transformer(hidden_size=width, num_heads=heads, layers=layers, mlp_ratio=inner / width)


@dataclass(frozen=True)
class PaLI(Architecture):
    """PaLI. The defaults are the preset ``17b``: ViT-e and mT5-XXL.

    Attributes:
        vision: The image encoder.
        encoder: The encoder over image tokens and words.
        decoder: The decoder, of the same width. Feed-forward layers of both are gated, by GELU.
        head_size: Size of a head of encoder and decoder, whatever their width.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
    """

    kind: Literal["pali"] = "pali"
    vision: Transformer = field(default_factory=lambda: _vit(1792, 15360, 16, 56))
    encoder: Transformer = field(default_factory=lambda: _mt5(4096, 10240, 64, 24))
    decoder: Transformer = field(default_factory=lambda: _mt5(4096, 10240, 64, 24))
    head_size: Annotated[int, Range(1)] = 64
    image_size: Annotated[int, Range(1)] = 224
    patch_size: Annotated[int, Range(1)] = 14
    text_length: Annotated[int, Range(3)] = 64  # start, a word, end
    vocab_size: Annotated[int, Range(1)] = 250112

    streams: ClassVar[tuple[str, ...]] = ("visual", "fused", "generation", "fused_generation")
    shows: ClassVar[tuple[Visual, ...]] = ("image",)

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of images."""
        return Patches.of_images(self.image_size, self.patch_size, **self.shown_as)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths=dict.fromkeys(("visual", "fused", "generation"), self.encoder.hidden_size),
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=0,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The image encoder, the encoder and the decoder."""
        return {"visual": self.vision, "fused": self.encoder, "generation": self.decoder}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({"vision": self.vision, "encoder": self.encoder, "decoder": self.decoder})
        return {**{name: getattr(self, name) for name in ("head_size", "patch_size", "vocab_size")}, **stacks}

    def layers(self, kit: Kit) -> Layers:
        """Image encoder, map, joined rows, encoder, decoder, losses."""
        vision, encoder, decoder, patches = self.vision, self.encoder, self.decoder, self.patches
        words, reads = Words(self.text_length, self.vocab_size), partial(torch.ne, other=kit.tokens.pad)
        yield "embed", EmbedT5(patches, vision, words, (encoder, decoder), reads, kit.compute_dtype)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, block=ImageBlock, may_shorten=False)
        yield "visual_norm", VisualNorm(vision)
        yield "visual_map", MapPatches(vision, encoder.hidden_size, patches)
        yield "join", JoinRows(kit.objectives, kit.gather, concatenates=True)
        rows, columns = patches.grid(is_video=False)
        sizes = self.head_size, self.text_length, rows * columns
        for index in range(encoder.layers):
            yield f"fused_{index:02d}", T5EncoderLayer(index, encoder, *sizes)
        yield "fused_norm", T5EncoderNorm(encoder)
        for index in range(decoder.layers):
            yield f"generation_{index:02d}", T5DecoderLayer(index, decoder, *sizes)
        vocabulary = partial(VocabularyHead, transforms=False, bias=False)
        fillings = self.fillings
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=fillings, vocabulary=vocabulary)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' ``T5ForConditionalGeneration`` or ``MT5...``, or of ``ViTModel``.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        if {"embeddings.cls_token", "vit.embeddings.cls_token"} & weights.keys():
            return from_vit(weights, path, self.vision, self.encoder, None)
        return from_transformers(weights, path, self.encoder, self.decoder, self.head_size)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from native_misfits(self.kind, self.sizes)
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name, stack in (("vision", self.vision), ("encoder", self.encoder), ("decoder", self.decoder)):
            # Heads with a size of their own need not divide the width.
            yield from stack_misfits(name, stack if name == "vision" else replace(stack, num_heads=1))
            yield from norm_misfits(name, stack, "pre", repr(self.kind))
        yield from activation_misfits("vision", self.vision)
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            yield from dense_misfits(name, stack, repr(self.kind), "; vision may have experts")
            yield from reading_misfits(name, stack)
            if stack.activation != "gelu":
                got, change = repr(stack.activation), "set it to 'gelu'"
                yield Misfit((name, "activation"), got, "'gelu' in 'pali', whose perceptrons are gated", change)
        if self.encoder.hidden_size != self.decoder.hidden_size:
            got, allowed = str(self.decoder.hidden_size), f"encoder.hidden_size {self.encoder.hidden_size}"
            yield Misfit(("decoder", "hidden_size"), got, allowed, "make them equal")
        yield from twin_misfits(self.kind, self.momentum)


def _of(vision: Transformer, text: Transformer) -> PaLI:
    return PaLI(vision=vision, encoder=text, decoder=text)


_VIT_G = _vit(1664, 8192, 16, 48)
PaLI.presets = {
    "tiny": replace(
        _of(_vit(192, 768, 3, 4), _mt5(128, 256, 2, 3)), image_size=64, patch_size=8, text_length=16, vocab_size=4096
    ),
    "3b": _of(_VIT_G, _mt5(1024, 2816, 16, 24)),
    "15b": _of(_VIT_G, _mt5(4096, 10240, 64, 24)),
    "17b": PaLI(),
}
