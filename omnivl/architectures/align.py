"""ALIGN: an EfficientNet for images and a BERT for texts, which is projected to the width of the images' features.

Source: Jia et al., ALIGN, arXiv 2102.05918, section 4.1; numbers as in transformers' ``AlignModel``, whose sizes are
    those of the public weights.
Differs: token types are folded into positions, and the position table has ``text_length`` rows. Texts' pooler, which no
    loss reads, is left out. The temperature is learnt as a logarithm. Blocks of images are left out for whole samples,
    as in EfficientNet; transformers' class zeroes single values. Running statistics: see ``omnivl.parts.efficientnet``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.align_names import from_transformers, refuse_options, refuse_shape, to_transformers
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.foreign import Foreign
from omnivl.architectures.misfits import activation_misfits, reading_misfits, stack_misfits, twin_misfits
from omnivl.chain.chain import Chain
from omnivl.chain.demands import CLEAN
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS, TextBlock
from omnivl.parts.efficientnet import ConvolutionLayer, EfficientNet, EmbedConvolved
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.project import Project
from omnivl.parts.sizes import Patches, Transformer, Words

STRIDE = 32
"""Pixels per position behind the last block."""


@dataclass(frozen=True)
class ALIGN(Architecture):
    """ALIGN. The defaults are those of transformers' class: EfficientNet-B7 and BERT-base.

    Attributes:
        vision: The image encoder; the size of the contrastive embeddings is its number of channels.
        text: The text encoder.
        image_size: Side of an image in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
    """

    kind: Literal["align"] = "align"
    vision: EfficientNet = field(default_factory=EfficientNet)
    text: Transformer = field(default_factory=lambda: Transformer(norm="post", norm_eps=TEXT_EPS, dropout=0.1))
    image_size: Annotated[int, Range(STRIDE)] = 600
    text_length: Annotated[int, Range(3)] = 64  # [CLS] word [SEP]
    vocab_size: Annotated[int, Range(1)] = 30522

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding")
    shows: ClassVar[tuple[Visual, ...]] = ("image",)

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.outputs)

    @property
    def patches(self) -> Patches:
        """Sizes of images; a patch is what a position behind the last block stands for."""
        return Patches.of_images(self.image_size, STRIDE, **self.shown_as)

    @property
    def words(self) -> Words:
        """Sizes of the text stream."""
        return Words(length=self.text_length, vocab_size=self.vocab_size)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths={"visual": self.vision.outputs, "text": self.text.hidden_size},
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.vision.outputs,
            patch_size=STRIDE,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The text encoder."""
        return {"text": self.text}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        image = {f"vision.{name}": getattr(self.vision, name) for name in ("width", "depth")}
        return {**image, **widths_of({"text": self.text}), "vocab_size": self.vocab_size}

    def layers(self, kit: Kit) -> Layers:
        """Encoders, the projection of texts, losses."""
        sizes = self.vision, self.image_size, self.words, self.text
        yield "embed", EmbedConvolved(*sizes, kit.tokens.pad, kit.compute_dtype)
        for index, block in enumerate(self.vision.blocks(self.image_size)):
            yield f"visual_{index:02d}", ConvolutionLayer(index, block, self.vision)
        for index in range(self.text.layers):
            yield f"text_{index:02d}", TextBlock(index, self.text, self.text_length)
        pools, unprojected = {"visual": mean_position}, ("visual",)
        yield "contrast", Project(self.heads, kit.objectives, pools=pools, unprojected=unprojected)
        yield "join", JoinRows(kit.objectives, kit.gather)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' ``AlignModel``.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        if "vision_model.embeddings.convolution.weight" not in weights:
            return None
        refuse_options(path, self.vision, self.text)
        return from_transformers(weights, path, self.vision.blocks(self.image_size), self.text.layers)

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign:
        """The model as transformers' ``AlignModel``.

        Raises:
            ModelError: The text encoder has experts, or the image's side is odd, which the class pads otherwise.
        """
        refuse_shape(self.text, self.image_size)
        return to_transformers(self.heads, self.image_size, self.vision, self.text, chain, tokens)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        if self.native:
            yield Misfit(
                ("sizes",), "'native'", "'fixed' or 'stretched' with architecture 'align'", "set it to 'fixed'"
            )
        yield from super().misfits()
        yield from stack_misfits("text", self.text)
        yield from activation_misfits("text", self.text)
        yield from reading_misfits("text", self.text)
        yield from twin_misfits(self.kind, self.momentum)


def mean_position(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The mean of all positions."""
    return stream.mean(1)
