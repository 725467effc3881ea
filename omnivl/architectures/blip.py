"""BLIP: an image encoder, and one BERT that reads texts, reads them beside an image, and writes them.

Source: Li et al., BLIP, arXiv 2201.12086, sections 3.1 and 3.2, and its released code: ViT's blocks; BERT's, with
    cross-attention in each. The decoder shares all weights with the encoder but self-attention and the norm after it.
    ITC, ITM and LM are the objectives ``univlc``, ``vlm`` and ``lm``. Outputs and gradients are those of transformers'
    ``BlipForImageTextRetrieval`` and ``BlipForConditionalGeneration``.
Differs: the map from hidden states to words is not tied to the word embedding, and token types are folded into
    positions. [ENC], which stands in the first place of a text beside an image, is a vector of its own
    (``embed.block.text.mark``) and no row of the word embedding. It stands there after training too; the released
    code puts it there in pretraining only, so that its scores of matching differ. Momentum twins are updated after an
    optimizer step instead of before a forward pass. ``univlc`` uses the keys of all replicas' batches; BLIP only the
    replica's own. Its queue starts empty; BLIP's starts with noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.blip_names import from_others, from_starts, to_transformers
from omnivl.architectures.foreign import Foreign, refuse_stack, refuse_without_words
from omnivl.architectures.misfits import (
    activation_misfits,
    dense_misfits,
    divisions,
    norm_misfits,
    reading_misfits,
    stack_misfits,
)
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS
from omnivl.parts.losses import Losses
from omnivl.parts.mixed import EmbedMixed, JoinWords, MixedLayer
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.project import Project
from omnivl.parts.sizes import MomentumConfig, Patches, Transformer, Words
from omnivl.parts.vit import VisualBlock, VisualNorm


@dataclass(frozen=True)
class BLIP(Architecture):
    """BLIP. The defaults are the preset ``base``, the paper's with ViT-B.

    Attributes:
        vision: The image encoder.
        text: The blocks that read and write texts.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings.
        momentum: Momentum twins of both encoders; None builds none.
    """

    kind: Literal["blip"] = "blip"
    vision: Transformer = field(default_factory=Transformer)
    text: Transformer = field(default_factory=lambda: Transformer(norm="post", norm_eps=TEXT_EPS))
    image_size: Annotated[int, Range(1)] = 224
    patch_size: Annotated[int, Range(1)] = 16
    text_length: Annotated[int, Range(3)] = 30  # [CLS] word [SEP]
    vocab_size: Annotated[int, Range(1)] = 30524
    projection_size: Annotated[int, Range(1)] = 256
    momentum: MomentumConfig | None = field(default_factory=MomentumConfig)

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding", "fused", "generation")
    shows: ClassVar[tuple[Visual, ...]] = ("image",)

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
        widths = dict.fromkeys(("text", "fused", "generation"), self.text.hidden_size)
        return HeadSizes(
            widths={"visual": self.vision.hidden_size} | widths,
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The image encoder and the blocks on texts."""
        return {"visual": self.vision, "mixed": self.text}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        own = {name: getattr(self, name) for name in ("patch_size", "vocab_size", "projection_size")}
        return {**own, **widths_of({"vision": self.vision, "text": self.text})}

    def layers(self, kit: Kit) -> Layers:
        """The image encoder, the blocks on texts, projections, heads."""
        patches, twins, vision = self.patches, kit.momentum, self.vision
        yield "embed", EmbedMixed(patches, vision, self.words, self.text, kit.tokens.pad, kit.compute_dtype, twins)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, twins, block=ImageBlock)
        yield "visual_norm", VisualNorm(vision, twins)
        sized = {"memory_size": vision.hidden_size, "length": self.text_length}
        for index in range(self.text.layers):
            yield f"mixed_{index:02d}", MixedLayer(index, self.text, patches, **sized, momentum=twins)
        yield "contrast", Project(self.heads, kit.objectives, self.momentum, joins_inputs=True)
        yield "join", JoinWords(kit.objectives, kit.gather)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings, momentum=self.momentum)

    def order(self, names: Sequence[str]) -> Sequence[str]:
        """The blocks on texts run twice, before and after the join."""
        blocks = [name for name in names if name.startswith("mixed_")]
        return [name for name in names if name != "losses"] + [*blocks, "losses"]

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of the released code, or of ``BlipForImageTextRetrieval`` or ``BlipForConditionalGeneration``.

        The last row of their word embedding is [ENC]'s. Or of what BLIP starts from: ``ViTModel`` and ``BertModel``.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        stacks = self.vision, self.text
        found = from_others(weights, path, *stacks)
        return from_starts(weights, path, *stacks) if found is None else found

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign:
        """The model as transformers' ``BlipForConditionalGeneration``, which writes as the chain does.

        Raises:
            ModelError: The model has an option that the class lacks, or no head on words.
        """
        refuse_stack("vision", self.vision, "pre", "BlipForConditionalGeneration")
        refuse_stack("text", self.text, "post", "BlipForConditionalGeneration")
        refuse_without_words(chain, "BlipForConditionalGeneration")
        return to_transformers(self.patches, self.vision, self.text, chain, tokens)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name, stack in (("vision", self.vision), ("text", self.text)):
            yield from stack_misfits(name, stack)
            yield from activation_misfits(name, stack)
        yield from norm_misfits("vision", self.vision, "pre", repr(self.kind))
        yield from reading_misfits("text", self.text)
        yield from dense_misfits("text", self.text, repr(self.kind), "; vision may have experts")


BLIP.presets = {
    "tiny": BLIP(
        vision=Transformer(hidden_size=192, num_heads=3, layers=4),
        text=Transformer(hidden_size=192, num_heads=3, layers=3),
        image_size=64,
        text_length=16,
        vocab_size=4096,
        projection_size=128,
    ),
    "base": BLIP(),
    "large": BLIP(vision=Transformer(hidden_size=1024, num_heads=16, layers=24)),
}
