"""Flamingo: a frozen vision encoder and a frozen language model, joined by a resampler and gated cross-attention.

Source: Alayrac et al., Flamingo, arXiv 2204.14198. What the paper leaves open is as in the code of OpenFlamingo
    (Awadalla et al., arXiv 2308.01390): which blocks have a gated layer before them, the marks in texts, and which
    words are predicted.
Differs: the vision encoder is a ViT, in the paper an NFNet-F6; the language model has OPT's options, in the paper
    Chinchilla's. ``<EOC>`` and ``<image>`` have rows of their own beside the word embedding, which stays as it is, and
    are tied to the output head; in OpenFlamingo the whole embedding has a gradient, masked to these two. The learnt
    embeddings of frames are stretched for clips with another number of them. Texts are scored, not written freely.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from moe.ranges import Range
from omnivl.architectures.base import Kit, Layers
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.grounded_language import GroundedLanguage, opt_blocks
from omnivl.errors import Misfit
from omnivl.parts.gated import DocumentTables, GatedLayer
from omnivl.parts.language import EMBED, STACK, LanguageBlock, LanguageEmbed, LanguageModel
from omnivl.parts.losses import Losses
from omnivl.parts.resampler import AttentionHeads, Resample, Resampler
from omnivl.parts.sizes import Patches, Transformer


@dataclass(frozen=True)
class Flamingo(GroundedLanguage):
    """Flamingo. The defaults are the paper's 3B with CLIP's ViT-L/14 and OPT-1.3B.

    Attributes:
        vision: The vision encoder: CLIP's image tower, which a stage's ``freeze`` keeps as it is.
        resampler: What gathers a fixed number of states from each picture or clip.
        cross_attention: Heads of the gated cross-attention.
        gated_every: Number of blocks of the language model for each gated layer, which stands before the last of them.
        sees: Pictures that a token looks at: the ``last`` one before it, or ``all`` before it.
        language: The language model; all of it but the rows of its two further words is kept by a stage's ``freeze``.
        num_frames: Frames of a training clip; if there are several, each has a learnt embedding. Sets of pictures may
            have any number.
    """

    kind: Literal["flamingo"] = "flamingo"
    resampler: Resampler = field(default_factory=Resampler)
    cross_attention: AttentionHeads = field(default_factory=AttentionHeads)
    gated_every: Annotated[int, Range(1)] = 1
    sees: Literal["last", "all"] = "last"
    language: LanguageModel = field(default_factory=lambda: LanguageModel(opt_blocks(2048, 32, 24), length=256))
    num_frames: Annotated[int, Range(1)] = 1

    streams: ClassVar[tuple[str, ...]] = ("visual", "language", "interleaved")

    @property
    def patches(self) -> Patches:
        """Sizes of the visual stream."""
        return replace(super().patches, num_frames=self.num_frames)

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        own = {"resampler.latents": self.resampler.latents, "gated_every": self.gated_every}
        for name, heads in (("resampler", self.resampler), ("cross_attention", self.cross_attention)):
            own |= {f"{name}.num_heads": heads.num_heads, f"{name}.head_size": heads.head_size}
        return {**super().widths, **own}

    def layers(self, kit: Kit) -> Layers:
        """Encoder, resampler, language model with gated layers, losses."""
        vision, language = self.vision, self.language
        yield from self.encoder_layers(kit.compute_dtype)
        yield "resampler", Resample(self.resampler, vision, self.patches)
        yield EMBED, LanguageEmbed(language, kit.compute_dtype, DocumentTables)
        seen = self.resampler.latents, self.sees == "all"
        for index in range(language.blocks.layers):
            if (index + 1) % self.gated_every == 0:
                gated = GatedLayer(index, language, vision.hidden_size, self.cross_attention, *seen)
                yield f"gated_{index:02d}", gated
            yield f"{STACK}_{index:02d}", LanguageBlock(index, language, 0)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        if self.gated_every > self.language.blocks.layers:
            allowed = f"1 to {self.language.blocks.layers}, the blocks of the language model"
            yield Misfit(("gated_every",), str(self.gated_every), allowed, "lower it")


Flamingo.presets = {
    "tiny": Flamingo(
        vision=Transformer(hidden_size=64, num_heads=2, layers=2, norm_eps=CLIP_EPS),
        resampler=Resampler(num_heads=2, head_size=32, latents=4, layers=2),
        cross_attention=AttentionHeads(num_heads=2, head_size=32),
        language=LanguageModel(opt_blocks(64, 2, 4), vocab_size=4096, positions=64, length=48),
        image_size=32,
        patch_size=16,
    ),
    "3b": Flamingo(),
    "9b": Flamingo(gated_every=4, language=LanguageModel(opt_blocks(4096, 32, 40), length=256)),
}
