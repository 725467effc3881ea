"""GIT: an image encoder, and a causal text decoder over image positions and words in one sequence.

Source: Wang et al., GIT, arXiv 2205.14100, and its released code; transformers' ``GitForCausalLM``, with which losses
    and gradients agree.
Differs: starting values of matrices are the project's (``moe.linear``). Label smoothing spreads over the whole
    vocabulary, in the released code over all words but the right one: a share of 0.1 there is 0.1 V / (V - 1) here.
    Clips may have any number of frames; their embeddings are stretched.
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
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.foreign import Foreign, refuse_stack, refuse_without_words
from omnivl.architectures.git_names import from_transformers, to_transformers
from omnivl.architectures.misfits import (
    activation_misfits,
    dense_misfits,
    divisions,
    norm_misfits,
    reading_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.join import JoinRows
from omnivl.parts.joint import JointLayer, MapVisual
from omnivl.parts.losses import Losses
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.starts import OneStartEmbedding
from omnivl.parts.towers import EmbedTowers
from omnivl.parts.vit import VisualBlock, VisualNorm


def _tower(width: int, heads: int, layers: int) -> Transformer:
    """A tower with CLIP's options."""
    return Transformer(hidden_size=width, num_heads=heads, layers=layers, norm_eps=CLIP_EPS)


def _bert(width: int, heads: int, layers: int, dropout: float = 0.1) -> Transformer:
    return Transformer(width, heads, layers, norm="post", norm_eps=TEXT_EPS, dropout=dropout)


@dataclass(frozen=True)
class GIT(Architecture):
    """GIT. The defaults are the preset ``base``, the released GIT-base.

    Attributes:
        vision: The image encoder: CLIP's image tower. CLIP's own weights have the activation ``quick_gelu``.
        decoder: The text decoder; its dropout also acts on the embeddings of words.
        image_size: Side of an image, or of a frame of a clip, in pixels.
        num_frames: Frames of a training clip. Each is encoded as an image; if there are several, each has a learnt
            embedding.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
    """

    kind: Literal["git"] = "git"
    vision: Transformer = field(default_factory=lambda: _tower(768, 12, 12))
    decoder: Transformer = field(default_factory=lambda: _bert(768, 12, 6))
    image_size: Annotated[int, Range(1)] = 224
    num_frames: Annotated[int, Range(1)] = 1
    patch_size: Annotated[int, Range(1)] = 16
    text_length: Annotated[int, Range(3)] = 40  # start, a word, end
    vocab_size: Annotated[int, Range(1)] = 30522

    streams: ClassVar[tuple[str, ...]] = ("visual", "generation")

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of the visual stream."""
        return Patches.of_images(
            self.image_size, self.patch_size, self.num_frames, norm_embeddings=True, **self.shown_as
        )

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads; of images they read what the decoder does."""
        return HeadSizes(
            widths=dict.fromkeys(self.streams, self.decoder.hidden_size),
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=0,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The image encoder and the decoder."""
        return {"visual": self.vision, "generation": self.decoder}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({"vision": self.vision, "decoder": self.decoder})
        return {"patch_size": self.patch_size, "vocab_size": self.vocab_size, **stacks}

    def layers(self, kit: Kit) -> Layers:
        """Image encoder, map, decoder, losses."""
        patches, decoder = self.patches, self.decoder
        embed = partial(OneStartEmbedding, tokens=kit.tokens)
        reads = partial(torch.ne, other=kit.tokens.pad)
        towers = patches, self.vision, Words(self.text_length, self.vocab_size), decoder
        yield "embed", EmbedTowers(*towers, reads, kit.compute_dtype, bias=False, embed_texts=embed)
        for index in range(self.vision.layers):
            block = VisualBlock(index, self.vision, patches, block=ImageBlock, may_shorten=False)
            yield f"visual_{index:02d}", block
        yield "visual_norm", VisualNorm(self.vision)
        yield "visual_map", MapVisual(self.vision, decoder.hidden_size, patches)
        yield "join", JoinRows(kit.objectives, kit.gather)
        for index in range(decoder.layers):
            yield f"generation_{index:02d}", JointLayer(index, decoder, self.text_length, patches)
        vocabulary = partial(VocabularyHead, transforms=False)
        fillings = self.fillings
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=fillings, vocabulary=vocabulary)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' ``GitForCausalLM``, or of CLIP's image tower, which GIT starts from.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        return from_transformers(weights, path, self.vision, self.decoder)

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign:
        """The model as transformers' ``GitForCausalLM``.

        Raises:
            ModelError: The model has an option that the class lacks, or no head on words.
        """
        refuse_stack("vision", self.vision, "pre", "GitForCausalLM")
        refuse_stack("decoder", self.decoder, "post", "GitForCausalLM")
        refuse_without_words(chain, "GitForCausalLM")
        return to_transformers(self.patches, self.vision, self.decoder, self.vocab_size, chain, tokens)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name, stack in (("vision", self.vision), ("decoder", self.decoder)):
            yield from stack_misfits(name, stack)
            yield from activation_misfits(name, stack)
        yield from norm_misfits("vision", self.vision, "pre", repr(self.kind))
        yield from reading_misfits("decoder", self.decoder)
        yield from dense_misfits("decoder", self.decoder, repr(self.kind), "; vision may have experts")
        yield from twin_misfits(self.kind, self.momentum)


GIT.presets = {
    "tiny": GIT(
        vision=_tower(192, 3, 4),
        decoder=_bert(128, 2, 3, dropout=0.0),
        image_size=64,
        patch_size=8,
        text_length=16,
        vocab_size=4096,
    ),
    "base": GIT(),
    "large": GIT(vision=_tower(1024, 16, 24), patch_size=14),
}
