"""Flamingo: a frozen vision encoder and a frozen language model, joined by a resampler and gated cross-attention.

Source: Alayrac et al., Flamingo, arXiv 2204.14198; OpenFlamingo's code (Awadalla et al., arXiv 2308.01390) for places
    of gated layers, marks and what is predicted. Losses and gradients agree with a model of torch's own modules, the
    resampler with that of transformers' IDEFICS.
Differs: the vision encoder is a ViT, in the paper an NFNet-F6; the language model has OPT's options, in the paper
    Chinchilla's. ``<EOC>`` and ``<image>`` have rows of their own beside the word embedding, which stays as it is, and
    are tied to the output head; in OpenFlamingo the whole embedding has a gradient, masked to these two. A learnt
    embedding of frames is stretched where a clip has another number of them. Texts are scored, not written freely.
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
from omnivl.architectures.foreign import read_json
from omnivl.architectures.misfits import (
    dense_misfits,
    divisions,
    language_misfits,
    norm_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.chain.sizes import HeadSizes
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import TextInput
from omnivl.errors import Misfit
from omnivl.parts.gated import DocumentTables, GatedLayer
from omnivl.parts.language import EMBED, STACK, LanguageBlock, LanguageEmbed, LanguageModel, language_order
from omnivl.parts.losses import Losses
from omnivl.parts.opt_names import is_opt, language_from_opt, refuse_options_of_opt
from omnivl.parts.picture_input import EmbedPictures
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.resampler import Heads, Resample, Resampler
from omnivl.parts.sizes import Patches, Transformer
from omnivl.parts.vit import VisualBlock, VisualNorm


def clip_large() -> Transformer:
    """CLIP's ViT-L."""
    return Transformer(hidden_size=1024, num_heads=16, layers=24, norm_eps=CLIP_EPS, activation="quick_gelu")


def _language() -> LanguageModel:
    blocks = Transformer(hidden_size=2048, num_heads=32, layers=24, activation="relu", norm_eps=1e-5)
    return LanguageModel(blocks, length=256)


@dataclass(frozen=True)
class Flamingo(Architecture):
    """Flamingo. The defaults are the paper's 3B with CLIP's ViT-L/14 and OPT-1.3B.

    Attributes:
        vision: The vision encoder, which a stage's ``freeze`` keeps as it is.
        resampler: What gathers a picture's or clip's states.
        gates: Heads of the gated cross-attention.
        gated_every: The last of so many blocks of the language model has a gated layer before it.
        sees: Pictures that a token looks at: the ``last`` one before it, or ``all`` before it.
        language: The language model, likewise kept as it is, but for the rows of its two further words.
        image_size: Side of an image, or of a frame of a clip, in pixels.
        num_frames: Frames of a training clip; if there are several, each has a learnt embedding. Sets of pictures may
            have any number.
        patch_size: Side of a patch in pixels.
    """

    kind: Literal["flamingo"] = "flamingo"
    vision: Transformer = field(default_factory=clip_large)
    resampler: Resampler = field(default_factory=Resampler)
    gates: Heads = field(default_factory=Heads)
    gated_every: Annotated[int, Range(1)] = 1
    sees: Literal["last", "all"] = "last"
    language: LanguageModel = field(default_factory=_language)
    image_size: Annotated[int, Range(1)] = 224
    num_frames: Annotated[int, Range(1)] = 1
    patch_size: Annotated[int, Range(1)] = 14

    streams: ClassVar[tuple[str, ...]] = ("visual", "language", "interleaved")
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
        return Patches.of_images(self.image_size, self.patch_size, self.num_frames, **shown)

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
        gathered = {"resampler.latents": self.resampler.latents, "gated_every": self.gated_every}
        return {**found, **gathered, "patch_size": self.patch_size, "language.vocab_size": self.language.vocab_size}

    def layers(self, kit: Kit) -> Layers:
        """Encoder, resampler, language model with gated layers, losses."""
        vision, patches, language = self.vision, self.patches, self.language
        yield "embed", EmbedPictures(patches, vision, kit.compute_dtype)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, block=ImageBlock, may_shorten=False)
        yield "visual_norm", VisualNorm(vision)
        yield "resampler", Resample(self.resampler, vision, patches)
        yield EMBED, LanguageEmbed(language, kit.compute_dtype, DocumentTables)
        seen = self.resampler.latents, self.sees == "all"
        for index in range(language.blocks.layers):
            if (index + 1) % self.gated_every == 0:
                yield f"gated_{index:02d}", GatedLayer(index, language, vision.hidden_size, self.gates, *seen)
            yield f"{STACK}_{index:02d}", LanguageBlock(index, language, 0)
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
        yield from language_misfits(self.language, 0)
        if self.gated_every > self.language.blocks.layers:
            allowed = f"1 to {self.language.blocks.layers}, the blocks of the language model"
            yield Misfit(("gated_every",), str(self.gated_every), allowed, "lower it")
        yield from twin_misfits(self.kind, self.momentum)


def reader_misfits(vision: Transformer, image_size: int, patch_size: int) -> Iterator[Misfit]:
    """Options of a vision encoder, a configuration's field ``vision``, that do not fit together."""
    yield from divisions({"image_size": (image_size, "patch_size", patch_size)})
    yield from stack_misfits("vision", vision)
    yield from norm_misfits("vision", vision, "pre", "a frozen encoder")
    yield from dense_misfits("vision", vision, "a frozen encoder")


def _small(width: int, heads: int, layers: int) -> Transformer:
    return Transformer(width, heads, layers, activation="relu", norm_eps=1e-5)


Flamingo.presets = {
    "tiny": Flamingo(
        vision=Transformer(hidden_size=64, num_heads=2, layers=2, norm_eps=CLIP_EPS),
        resampler=Resampler(num_heads=2, head_size=32, latents=4, layers=2),
        gates=Heads(num_heads=2, head_size=32),
        language=LanguageModel(_small(64, 2, 4), vocab_size=4096, positions=64, length=48),
        image_size=32,
        patch_size=16,
    ),
    "3b": Flamingo(),
    "9b": Flamingo(
        gated_every=4, language=LanguageModel(_small(4096, 32, 40), length=256), resampler=Resampler(), gates=Heads()
    ),
}
