"""FLAVA: an image encoder, a text encoder, and a multimodal encoder over the outputs of both.

Source: Singh et al., FLAVA, arXiv 2112.04482, section 3.1; numbers as in transformers' ``FlavaModel``.
Differs: token types are folded into positions, and the position table has ``text_length`` rows. The map from hidden
    states to words is not tied to the word embedding, as in the released code. Poolers of the encoders alone, which no
    loss of FLAVA reads, are left out; that of the multimodal encoder is the one with which ``mmm`` matches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.flava_names import from_transformers, refuse_options, refuse_shape, to_transformers
from omnivl.architectures.foreign import Foreign
from omnivl.architectures.misfits import (
    activation_misfits,
    divisions,
    norm_misfits,
    reading_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS, TextBlock
from omnivl.parts.flava import EncoderOutputs, FusedClass, JoinOutputs, MultimodalLayer
from omnivl.parts.losses import Losses
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.project import Project
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.towers import EmbedTowers
from omnivl.parts.vilt import FusedNorm
from omnivl.parts.vit import VisualBlock


def _stack(layers: int) -> Transformer:
    return Transformer(layers=layers, norm_eps=TEXT_EPS)


@dataclass(frozen=True)
class FLAVA(Architecture):
    """FLAVA. The defaults are the paper's.

    Attributes:
        vision: The image encoder.
        text: The text encoder.
        fusion: The multimodal encoder.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings.
    """

    kind: Literal["flava"] = "flava"
    vision: Transformer = field(default_factory=lambda: _stack(12))
    text: Transformer = field(default_factory=lambda: _stack(12))
    fusion: Transformer = field(default_factory=lambda: _stack(6))
    image_size: Annotated[int, Range(1)] = 224
    patch_size: Annotated[int, Range(1)] = 16
    text_length: Annotated[int, Range(3)] = 77  # [CLS] word [SEP]
    vocab_size: Annotated[int, Range(1)] = 30522
    projection_size: Annotated[int, Range(1)] = 768

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding", "fused", "fused_visual", "masked_visual")
    shows: ClassVar[tuple[Visual, ...]] = ("none", "image")

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
        """Sizes of the text stream."""
        return Words(length=self.text_length, vocab_size=self.vocab_size)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        fused = dict.fromkeys(("fused", "fused_visual"), self.fusion.hidden_size)
        return HeadSizes(
            widths={"visual": self.vision.hidden_size, "text": self.text.hidden_size, **fused},
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The three encoders."""
        return {"visual": self.vision, "text": self.text, "fused": self.fusion}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({name: getattr(self, name) for name in _STACKS})
        return {**{name: getattr(self, name) for name in _WIDTHS}, **stacks}

    def layers(self, kit: Kit) -> Layers:
        """Encoders, projections, the multimodal encoder, heads."""
        vision, text, fusion, length, patches = self.vision, self.text, self.fusion, self.text_length, self.patches
        has_token = partial(torch.ne, other=kit.tokens.pad)
        yield "embed", EmbedTowers(patches, vision, self.words, text, has_token, kit.compute_dtype, masks=True)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, block=ImageBlock)
        for index in range(text.layers):
            yield f"text_{index:02d}", TextBlock(index, text, length, norm_out=False)
        yield "encoded", EncoderOutputs(vision, text, fusion, length, patches)
        yield "contrast", Project(self.heads, kit.objectives)
        yield "join", JoinOutputs(kit.objectives, kit.gather, concatenates=True)
        yield "fused_embed", FusedClass(fusion.hidden_size)
        for index in range(fusion.layers):
            yield f"fused_{index:02d}", MultimodalLayer(index, fusion, length, patches)
        yield "fused_norm", FusedNorm(fusion, has_class=True)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' ``FlavaForPreTraining`` or ``FlavaModel``.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        if not any(name.removeprefix("flava.").startswith("multimodal_model.") for name in weights):
            return None
        refuse_options(path, self.vision, self.text, self.fusion)
        return from_transformers(weights, path, {name: getattr(self, name).layers for name in _STACKS})

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign:
        """The model as transformers' ``FlavaModel``.

        Raises:
            ModelError: An encoder has an option that the class lacks.
        """
        refuse_shape({name: getattr(self, name) for name in _STACKS})
        return to_transformers(self.heads, self.image_size, (self.vision, self.text, self.fusion), chain, tokens)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name in _STACKS:
            stack = getattr(self, name)
            yield from stack_misfits(name, stack)
            yield from activation_misfits(name, stack)
            yield from norm_misfits(name, stack, "pre", repr(self.kind))
        if self.fusion.activation != "gelu":
            yield Misfit(("fusion", "activation"), repr(self.fusion.activation), "'gelu' there", "set it to 'gelu'")
        if self.text.hidden_size != self.fusion.hidden_size:
            got, allowed = str(self.fusion.hidden_size), f"text.hidden_size {self.text.hidden_size}"
            yield Misfit(("fusion", "hidden_size"), got, allowed, "make them equal: words have one head")
        yield from reading_misfits("text", self.text)
        yield from twin_misfits(self.kind, self.momentum)


_STACKS = ("vision", "text", "fusion")
_WIDTHS = ("patch_size", "vocab_size", "projection_size")
