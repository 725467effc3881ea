"""OmniVL: a visual encoder of images and videos, a text encoder, and two text decoders that attend to visuals.

Source: Wang et al., OmniVL, arXiv 2209.07526.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from moe.config import Activation, AttributeConfig, DenseConfig, MoMEConfig
from moe.ranges import Range
from omnivl.architectures.base import Kit, Layers
from omnivl.architectures.one_width import OneWidth
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS, TextBlock
from omnivl.parts.decoder import AlignmentBlock, GenerationBlock
from omnivl.parts.embed import Embed
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.project import Project
from omnivl.parts.sizes import Patches, Transformer
from omnivl.parts.vit import VisualBlock, VisualNorm


@dataclass(frozen=True)
class VisionConfig:
    """Details of the visual encoder in which families of pretrained weights differ; the defaults are ViT's.

    Attributes:
        activation: Of its dense perceptrons: ``gelu``, or ``quick_gelu`` as in CLIP.
        norm_eps: Added to the variance in its normalisations: 1e-6 as in Google's ViT, 1e-5 in CLIP and BLIP, 1e-12 in
            BEiT and in transformers' ViT.
        norm_embeddings: Whether embeddings are normalised before the first block, as in CLIP.
        relative_positions: Whether attention has a bias by the relative position of two patches, as in BEiT.
    """

    activation: Activation = "gelu"
    norm_eps: Annotated[float, Range(above=0)] = 1e-6
    norm_embeddings: bool = False
    relative_positions: bool = False


@dataclass(frozen=True)
class OmniVL(OneWidth):
    """OmniVL. The defaults are the preset ``base``, the paper's.

    Attributes:
        vision_layers: Blocks of the visual encoder.
        text_layers: Blocks of the text encoder. With none, and the mean as ``text_pooling``, a text is a bag of words.
        alignment_layers: Blocks of the alignment decoder, on top of the text encoder's output.
        generation_layers: Blocks of the generation decoder, on word embeddings, causal.
        text_norm: Where text and decoder blocks normalise: ``post``, as BERT does and its weights need; ``pre`` learns
            faster from random weights.
        vision: Details of the visual encoder.
    """

    kind: Literal["omnivl"] = "omnivl"
    vision_layers: Annotated[int, Range(1)] = 12
    text_layers: Annotated[int, Range(0)] = 12
    alignment_layers: Annotated[int, Range(0)] = 12
    generation_layers: Annotated[int, Range(0)] = 12
    text_norm: Literal["post", "pre"] = "post"
    vision: VisionConfig = field(default_factory=VisionConfig)

    streams: ClassVar[tuple[str, ...]] = (
        *("visual", "text", "embedding", "fused", "generation", "masked_visual", "momentum_fused", "fused_generation"),
    )

    @property
    def patches(self) -> Patches:
        """Sizes of the visual stream."""
        return replace(
            super().patches,
            norm_embeddings=self.vision.norm_embeddings,
            relative_positions=self.vision.relative_positions,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The encoders and the decoders."""
        visual = replace(
            self.stack_of(self.vision_layers),
            norm_eps=self.vision.norm_eps,
            activation=self.vision.activation,
            drop_path=self.drop_path,
            layer_scale_init=self.layer_scale_init,
        )
        words = replace(self.stack_of(0), norm=self.text_norm, norm_eps=TEXT_EPS, dropout=self.dropout)
        return {
            "visual": visual,
            "text": replace(words, layers=self.text_layers),
            "alignment": replace(words, layers=self.alignment_layers),
            "generation": replace(words, layers=self.generation_layers),
        }

    @property
    def depths(self) -> Mapping[str, int]:
        """Numbers of blocks by the fields that give them."""
        return {name: getattr(self, name) for name in _DEPTHS}

    def layers(self, kit: Kit) -> Layers:
        """Encoders, projections, decoders, heads."""
        stacks, patches, length, twins = self.stacks, self.patches, self.text_length, kit.momentum
        visual, text = stacks["visual"], stacks["text"]
        first = {stream: stream not in self.pools for stream in ("visual", "text")}
        yield "embed", Embed(patches, visual, self.words, text, kit.tokens.pad, kit.compute_dtype, momentum=twins)
        for index in range(visual.layers):
            yield f"visual_{index:02d}", VisualBlock(index, visual, patches, twins, may_shorten=first["visual"])
        yield "visual_norm", VisualNorm(visual, twins)
        for index in range(text.layers):
            yield f"text_{index:02d}", TextBlock(index, text, length, twins, may_shorten=first["text"])
        yield "contrast", Project(self.heads, kit.objectives, self.momentum, pools=self.pools)
        yield "join", JoinRows(kit.objectives, kit.gather)
        for index in range(self.alignment_layers):
            fused_twins = kit.momentum_of("fused")
            yield (
                f"alignment_{index:02d}",
                AlignmentBlock(index, stacks["alignment"], length, patches, momentum=fused_twins),
            )
        for index in range(self.generation_layers):
            yield f"generation_{index:02d}", GenerationBlock(index, stacks["generation"], length, patches)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings, momentum=self.momentum)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        if self.vision.activation != "gelu" and not isinstance(self.ffn, DenseConfig | MoMEConfig):
            got = f"{self.vision.activation!r} with ffn kind {self.ffn.kind!r}"
            allowed = "'gelu' where there are sparse or attribute experts"
            change = "set it to 'gelu', or model.ffn.kind to 'dense' or 'mome'"
            yield Misfit(("vision", "activation"), got, allowed, change)
        if self.vision.relative_positions and self.patch_dropout > 0:
            got = f"true with patch_dropout {self.patch_dropout:g}"
            yield Misfit(("vision", "relative_positions"), got, "false, or true with patch_dropout 0", "change either")
        if self.vision.relative_positions and self.native:
            got, allowed = "true with sizes 'native'", "false, or true where frames are squares"
            yield Misfit(("vision", "relative_positions"), got, allowed, "change either")
        if isinstance(self.ffn, AttributeConfig) and self.ffn.attention:
            got, change = "true in architecture 'omnivl'", "set it to false, or model.kind to unified"
            yield Misfit(("ffn", "attention"), got, "false there", change)


_DEPTHS = ("vision_layers", "text_layers", "alignment_layers", "generation_layers")

OmniVL.presets = {
    "tiny": OmniVL(
        hidden_size=192,
        num_heads=3,
        vision_layers=6,
        text_layers=4,
        alignment_layers=2,
        generation_layers=2,
        image_size=64,
        video_size=64,
        num_frames=8,
        patch_size=8,
        text_length=16,
        vocab_size=4096,
        projection_size=128,
        text_norm="pre",
    ),
    "small": OmniVL(
        hidden_size=384,
        num_heads=6,
        vision_layers=12,
        text_layers=6,
        alignment_layers=3,
        generation_layers=3,
        image_size=96,
        video_size=96,
        num_frames=8,
        patch_size=16,
        text_length=32,
        projection_size=256,
    ),
    "base": OmniVL(),
    "large": OmniVL(
        hidden_size=1024, num_heads=16, vision_layers=24, text_layers=12, alignment_layers=12, generation_layers=12
    ),
    # ViT-g of EVA and BEiT-3: 1408 wide, 40 layers, 16 heads, 6144 inner.
    "giant": OmniVL(
        hidden_size=1408,
        num_heads=16,
        mlp_ratio=6144 / 1408,
        vision_layers=40,
        text_layers=24,
        alignment_layers=12,
        generation_layers=12,
        patch_size=14,
        recompute="block",
    ),
}
"""``tiny`` is the quickstart's, ``base`` the paper's. The plan's tokenizer sets the vocabulary size."""
