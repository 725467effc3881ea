"""What architectures share whose language model reads texts beside pictures that CLIP's image tower has encoded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Layers, widths_of
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.clip_names import tower_from_clip
from omnivl.architectures.foreign import read_json
from omnivl.architectures.misfits import (
    dense_misfits,
    divisions,
    language_misfits,
    native_misfits,
    norm_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.chain.sizes import HeadSizes
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import TextInput
from omnivl.errors import Misfit
from omnivl.parts.language import LanguageModel, language_order
from omnivl.parts.opt_names import is_opt, language_from_opt, refuse_options_of_opt
from omnivl.parts.picture_input import EmbedPictures
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.sizes import Patches, Transformer
from omnivl.parts.vit import VisualBlock, VisualNorm


def clip_large() -> Transformer:
    """CLIP's ViT-L."""
    return Transformer(hidden_size=1024, num_heads=16, layers=24, norm_eps=CLIP_EPS, activation="quick_gelu")


def opt_blocks(width: int, heads: int, layers: int) -> Transformer:
    """Blocks with OPT's options."""
    return Transformer(width, heads, layers, activation="relu", norm_eps=1e-5)


@dataclass(frozen=True)
class GroundedLanguage(Architecture):
    """Base of these architectures.

    Attributes:
        vision: The vision encoder: CLIP's image tower.
        language: The language model, which a stage's ``freeze`` keeps as it is.
        image_size: Side of an image, or of a frame of a clip, in pixels.
        patch_size: Side of a patch in pixels.
    """

    vision: Transformer = field(default_factory=clip_large)
    language: LanguageModel = field(default_factory=LanguageModel)
    image_size: Annotated[int, Range(1)] = 224
    patch_size: Annotated[int, Range(1)] = 14

    vocabulary: ClassVar[tuple[str, ...]] = ("language", "vocab_size")
    readers: ClassVar[tuple[tuple[str, ...], ...]] = (("language",),)

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.language.length, self.vision.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of the visual stream."""
        shown = {"stretched": self.sizes == "stretched", "norm_embeddings": True}
        return Patches.of_images(self.image_size, self.patch_size, **shown)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths={"visual": self.vision.hidden_size, "language": self.language.blocks.hidden_size},
            text_length=self.language.length,
            vocab_size=self.language.vocab_size,
            projection_size=0,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The vision encoder and the language model."""
        return {"visual": self.vision, "language": self.language.blocks}

    @property
    def text_inputs(self) -> Mapping[str, TextInput]:
        """The text input of the language model."""
        return {"language": self.language.text_input}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({"vision": self.vision, "language.blocks": self.language.blocks})
        return {**stacks, "patch_size": self.patch_size, "language.vocab_size": self.language.vocab_size}

    def encoder_layers(self, dtype: torch.dtype) -> Layers:
        """The vision encoder: pixels to ``visual``; ``dtype`` is the compute dtype."""
        yield "embed", EmbedPictures(self.patches, self.vision, dtype)
        for index in range(self.vision.layers):
            block = VisualBlock(index, self.vision, self.patches, block=ImageBlock, may_shorten=False)
            yield f"visual_{index:02d}", block
        yield "visual_norm", VisualNorm(self.vision)

    def order(self, names: Sequence[str]) -> Sequence[str]:
        """The language model's embedding is also its head."""
        return language_order(names)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of CLIP's image tower or of OPT, as transformers names them.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        if is_opt(weights):
            said = read_json(path / "config.json") if path.is_dir() else {}
            refuse_options_of_opt(said, self.language, path)
            return language_from_opt(weights)
        return tower_from_clip(weights, path, self.vision)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from native_misfits(self.kind, self.sizes)
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        yield from stack_misfits("vision", self.vision)
        yield from norm_misfits("vision", self.vision, "pre", repr(self.kind))
        yield from dense_misfits("vision", self.vision, repr(self.kind))
        yield from language_misfits(self.language, self.prefix_positions)
        yield from twin_misfits(self.kind, self.momentum)

    @property
    def prefix_positions(self) -> int:
        """Positions before the tokens of a row of the language model."""
        return 0
