"""Frozen: a vision encoder, the only part that is trained, whose output is the prefix of a frozen language model.

Source: Tsimpoukelli et al., Frozen, arXiv 2106.13884, section 3. Its code is not released.
Differs: the vision encoder is a ViT, of which the class token is mapped; in the paper it is an NF-ResNet-50, of which
    the pooled output is. The language model has OPT's options and learnt absolute positions; in the paper, one of 7
    billion parameters with relative positions. A prefix stands at the beginning of a text, not within it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.clip_names import tower_from_clip
from omnivl.architectures.flamingo import clip_large, reader_misfits
from omnivl.architectures.foreign import read_json
from omnivl.architectures.misfits import language_misfits, twin_misfits
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import TextInput
from omnivl.errors import Misfit
from omnivl.parts.block import BlockLayer
from omnivl.parts.language import EMBED, STACK, LanguageBlock, LanguageEmbed, LanguageModel, language_order
from omnivl.parts.linear import Linear
from omnivl.parts.losses import Losses
from omnivl.parts.opt_names import is_opt, language_from_opt, refuse_options_of_opt
from omnivl.parts.picture_input import EmbedPictures
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.sizes import Patches, Transformer
from omnivl.parts.vit import VisualBlock, VisualNorm


def _language() -> LanguageModel:
    blocks = Transformer(hidden_size=4096, num_heads=32, layers=32, activation="relu", norm_eps=1e-5)
    return LanguageModel(blocks, length=32)


class VisualPrefix(BlockLayer):
    """The class token of an image, mapped to ``prefix``: one linear map to all of its positions."""

    stack = "prefix"

    def __init__(self, size: int, prefix: int, hidden_size: int) -> None:
        """Builds the map of width ``size`` to ``prefix`` positions of width ``hidden_size``."""
        super().__init__("prefix", lambda still: Linear(size, prefix * hidden_size))
        self.positions = prefix

    def acts(self, layout: StepLayout) -> bool:
        """Whether a language row has a prefix."""
        return bool(layout.language) and "queries" in layout.fields

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations of the map."""
        assert isinstance(self.block, Linear)
        one = 2.0 * self.block.in_features * self.block.out_features
        return self.backward.passes * layout.batch_size * one * self.acts(layout)

    def forward(self, state: State) -> State:
        """Makes ``prefix [B, Q, D]``. When decoding, only the first call has pictures, as ``visual`` or ``memory``."""
        knows = any(name.startswith("cache/") and name.endswith("/cross") for name in state)
        seen = state.get("visual", state.get("memory"))
        if not self.acts(state.layout) or knows or seen is None:
            return state
        mapped = self.run(seen[:, 0])
        return state.updated(drop=("visual",), prefix=mapped.view(len(mapped), self.positions, -1))


@dataclass(frozen=True)
class Frozen(Architecture):
    """Frozen. The defaults have CLIP's ViT-L/14 as encoder and OPT-6.7B.

    Attributes:
        vision: The vision encoder, which is trained.
        prefix: Positions of the prefix, the paper's k.
        language: The language model, which a stage's ``freeze`` keeps as it is.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
    """

    kind: Literal["frozen"] = "frozen"
    vision: Transformer = field(default_factory=clip_large)
    prefix: Annotated[int, Range(1)] = 2
    language: LanguageModel = field(default_factory=_language)
    image_size: Annotated[int, Range(1)] = 224
    patch_size: Annotated[int, Range(1)] = 14

    streams: ClassVar[tuple[str, ...]] = ("visual", "queries", "language")
    shows: ClassVar[tuple[Visual, ...]] = ("none", "image")
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
        widths = {"visual": self.vision.hidden_size, "language": self.language.blocks.hidden_size}
        return HeadSizes(widths, self.language.length, self.language.vocab_size, 0, self.patch_size, 1, self.image_size)

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
        found = widths_of({"vision": self.vision, "language.blocks": self.language.blocks})
        own = {"prefix": self.prefix, "patch_size": self.patch_size, "language.vocab_size": self.language.vocab_size}
        return {**found, **own}

    def layers(self, kit: Kit) -> Layers:
        """Encoder, prefix, language model, losses."""
        vision, patches, language = self.vision, self.patches, self.language
        yield "embed", EmbedPictures(patches, vision, kit.compute_dtype)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, block=ImageBlock, may_shorten=False)
        yield "visual_norm", VisualNorm(vision)
        yield "prefix", VisualPrefix(vision.hidden_size, self.prefix, language.blocks.hidden_size)
        yield EMBED, LanguageEmbed(language, kit.compute_dtype)
        for index in range(language.blocks.layers):
            yield f"{STACK}_{index:02d}", LanguageBlock(index, language, self.prefix)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

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
        yield from super().misfits()
        yield from reader_misfits(self.vision, self.image_size, self.patch_size)
        yield from language_misfits(self.language, self.prefix)
        yield from twin_misfits(self.kind, self.momentum)


Frozen.presets = {
    "tiny": Frozen(
        vision=Transformer(hidden_size=192, num_heads=3, layers=4, norm_eps=CLIP_EPS),
        language=LanguageModel(
            Transformer(hidden_size=192, num_heads=3, layers=3, activation="relu", norm_eps=1e-5),
            vocab_size=4096,
            positions=64,
            length=16,
        ),
        image_size=64,
        patch_size=16,
    ),
    "7b": Frozen(),
}
