"""One transformer for the tokens of images, clips and texts, which runs on them apart and joined.

Sources: Bao et al., VLMo, arXiv 2111.02358; Wang et al., BEiT-3, arXiv 2208.10442; Mustafa et al., LIMoE,
    arXiv 2206.02770.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

from moe.config import AttributeConfig, DenseConfig, MoMEConfig
from moe.ranges import Range
from omnivl.architectures.base import Kit, Layers
from omnivl.architectures.omnivl import OmniVL
from omnivl.architectures.one_width import OneWidth
from omnivl.errors import Misfit
from omnivl.parts.bert import TEXT_EPS
from omnivl.parts.embed import Embed
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.project import Project
from omnivl.parts.sizes import Transformer
from omnivl.parts.unified import UNIFIED_EPS, UnifiedLayer, UnifiedNorm, Variant


@dataclass(frozen=True)
class Unified(OneWidth):
    """The unified transformer: VLMo, BEiT-3 or LIMoE, depending on the filling of its feed-forward slots.

    Attributes:
        depth: Blocks.
        multiway: Whether attention projections and norms are by modality, as in BEiT-3.
        norm_eps: Added to the variance in normalisations: 1e-6 as in VLMo, 1e-5 in BEiT-3.
        sub_norm: Whether blocks normalise twice more, before the output projection of attention and before the second
            map of dense perceptrons, as in BEiT-3. Values, output projections and perceptrons then start larger, by
            ``sqrt(log(2 * depth))``.
        norm_by_perceptron: Whether the second norm of a block is one for each perceptron of ``ffn: mome``, as in VLMo:
            images, texts and, from ``fusion_from`` on, joined tokens.
    """

    kind: Literal["unified"] = "unified"
    depth: Annotated[int, Range(1)] = 12
    multiway: bool = False
    norm_eps: Annotated[float, Range(above=0)] = UNIFIED_EPS
    sub_norm: bool = False
    norm_by_perceptron: bool = False

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding", "fused", "fused_visual", "masked_visual")

    @classmethod
    def like(cls, towers: OmniVL) -> "Unified":
        """One transformer of the size of a visual encoder."""
        shared = {name: getattr(towers, name) for entry in fields(OneWidth) if (name := entry.name) != "kind"}
        return cls(**shared, depth=towers.vision_layers)

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The transformer."""
        own = self.stack_of(self.depth)
        return {
            "unified": replace(
                own, norm_eps=self.norm_eps, drop_path=self.drop_path, layer_scale_init=self.layer_scale_init
            )
        }

    @property
    def variant(self) -> Variant:
        """Of the blocks."""
        return Variant(self.multiway, self.sub_norm, self.norm_by_perceptron)

    @property
    def depths(self) -> Mapping[str, int]:
        """Numbers of blocks by the fields that give them."""
        return {"depth": self.depth}

    def layers(self, kit: Kit) -> Layers:
        """Blocks, projections, heads."""
        own, patches, twins = self.stacks["unified"], self.patches, kit.momentum
        words = replace(own, norm_eps=TEXT_EPS, dropout=self.dropout)
        yield (
            "embed",
            Embed(
                patches, own, self.words, words, kit.tokens.pad, kit.compute_dtype, momentum=twins, joins_inputs=True
            ),
        )
        for index in range(self.depth):
            name = f"unified_{index:02d}"
            yield name, UnifiedLayer(index, own, self.variant, patches, self.text_length, twins)
        yield "unified_norm", UnifiedNorm(own, self.multiway, twins)
        yield "contrast", Project(self.heads, kit.objectives, self.momentum, joins_inputs=True, pools=self.pools)
        yield "join", JoinRows(kit.objectives, kit.gather, joins_inputs=True, concatenates=True)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings, momentum=self.momentum)

    def order(self, names: Sequence[str]) -> Sequence[str]:
        """The blocks run twice: before and after the join of rows."""
        blocks = [name for name in names if name.startswith("unified_")]
        return ["embed", *blocks, "contrast", "join", *blocks, "losses"]

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        if isinstance(self.ffn, AttributeConfig) and self.ffn.attention and self.multiway:
            got, change = "true beside multiway", "set one of the two to false"
            yield Misfit(("ffn", "attention"), got, "one of the two", change)
        if self.sub_norm and not isinstance(self.ffn, DenseConfig | MoMEConfig):
            got, allowed = f"true with ffn kind {self.ffn.kind!r}", "false where there are sparse or attribute experts"
            yield Misfit(("sub_norm",), got, allowed, "set it to false, or ffn.kind to dense or mome")
        if self.norm_by_perceptron and not isinstance(self.ffn, MoMEConfig):
            got, allowed = f"true with ffn kind {self.ffn.kind!r}", "true with perceptrons by modality"
            yield Misfit(("norm_by_perceptron",), got, allowed, "set it to false, or ffn.kind to mome")
        if self.norm_by_perceptron and self.multiway:
            got, change = "true beside multiway", "set one of the two to false"
            yield Misfit(("norm_by_perceptron",), got, "one of the two", change)


Unified.presets = {name: Unified.like(preset) for name, preset in OmniVL.presets.items()}
