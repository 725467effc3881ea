"""Base of architectures whose stacks all have one width: flat fields instead of a section for each stack."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from moe.config import DenseConfig, FeedForwardConfig
from moe.ranges import Range
from omnivl.architectures.base import Architecture
from omnivl.architectures.misfits import divisions, filling_misfits
from omnivl.chain.sizes import HeadSizes
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.project import Pool, Pooling, pools_of
from omnivl.parts.sizes import MomentumConfig, Patches, Recompute, Transformer, Words


@dataclass(frozen=True)
class OneWidth(Architecture):
    """Sizes of architectures with one width.

    Attributes:
        hidden_size: Width D of all streams.
        num_heads: Attention heads; head size is hidden_size / num_heads.
        mlp_ratio: Inner size of the feed-forward layer over hidden_size.
        image_size: Side of a training image in pixels.
        video_size: Side of a training frame in pixels.
        num_frames: Frames of a training clip.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per 3D patch.
        position_std: Deviation of the starting values of spatial positions. At ViT's 0.02 patches drown them in small
            models; at 0.3 these learn in half as many steps which of several places a text means.
        temporal_gain: Scale of the temporal branches' starting values. At 0 their projections and the temporal
            positions are zero, so that a clip of equal frames gives exactly the image's result. Above 0 projections
            start at this factor times the scale of other maps, temporal positions with this deviation, and motion is
            learnt many times sooner.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings.
        patch_dropout: Share of the patches of an image (of a clip: of the same places in all frames) that training
            leaves out. Steps with a masked visual pass leave out none.
        drop_path: Stochastic depth rate of the last visual block, rising linearly from 0.
        dropout: Dropout of words, and in text and decoder blocks.
        visual_pooling: What of a picture or clip is projected for contrast: ``first``, the class token, or ``mean``,
            the mean of the patches.
        text_pooling: What of a text is projected: ``first``, the class token, or ``mean``, the mean of its tokens.
        layer_scale_init: Initial LayerScale of the blocks that see patches; None for none.
        momentum: Momentum twins; None builds none.
        ffn: The filling of the feed-forward slots.
        recompute: Activations that the backward pass recomputes: ``none``; ``attention``, those between the projections
            of attentions; ``ffn``, those within feed-forward slots; ``block``, those of whole blocks.
        recompute_every: Of this many consecutive blocks of a stack the first is recomputed; 1 for all.
    """

    hidden_size: Annotated[int, Range(1)] = 768
    num_heads: Annotated[int, Range(1)] = 12
    mlp_ratio: Annotated[float, Range(above=0)] = 4.0
    image_size: Annotated[int, Range(1)] = 224
    video_size: Annotated[int, Range(1)] = 112
    num_frames: Annotated[int, Range(1)] = 32
    patch_size: Annotated[int, Range(1)] = 16
    tubelet_size: Annotated[int, Range(1)] = 1
    position_std: Annotated[float, Range(above=0)] = 0.02
    temporal_gain: Annotated[float, Range(0)] = 0.0
    text_length: Annotated[int, Range(3)] = 128  # [CLS] word [SEP]
    vocab_size: Annotated[int, Range(1)] = 30522
    projection_size: Annotated[int, Range(1)] = 256
    patch_dropout: Annotated[float, Range(0, below=1)] = 0.0
    drop_path: Annotated[float, Range(0, 1)] = 0.0
    dropout: Annotated[float, Range(0, 1)] = 0.0
    visual_pooling: Pooling = "first"
    text_pooling: Pooling = "first"
    layer_scale_init: float | None = None
    momentum: MomentumConfig | None = field(default_factory=MomentumConfig)
    ffn: FeedForwardConfig = field(default_factory=DenseConfig)
    recompute: Recompute = "none"
    recompute_every: Annotated[int, Range(1)] = 1

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.hidden_size)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths=dict.fromkeys(self.streams, self.hidden_size),
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=self.tubelet_size,
            image_size=self.image_size,
        )

    @property
    def words(self) -> Words:
        """Sizes of the text streams."""
        return Words(length=self.text_length, vocab_size=self.vocab_size)

    @property
    def inner_size(self) -> int:
        """Inner size of a feed-forward layer."""
        return round(self.hidden_size * self.mlp_ratio)

    @property
    def patches(self) -> Patches:
        """Sizes of the visual stream."""
        return Patches(
            image_size=self.image_size,
            video_size=self.video_size,
            num_frames=self.num_frames,
            patch_size=self.patch_size,
            tubelet_size=self.tubelet_size,
            position_std=self.position_std,
            temporal_gain=self.temporal_gain,
            patch_dropout=self.patch_dropout,
            **self.shown_as,
        )

    @property
    def pools(self) -> dict[str, Pool]:
        """How the projection layer pools its streams."""
        return pools_of(visual=self.visual_pooling, text=self.text_pooling)

    def stack_of(self, layers: int) -> Transformer:
        """A stack of ``layers`` blocks; options that differ between stacks keep their defaults."""
        return Transformer(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            layers=layers,
            mlp_ratio=self.mlp_ratio,
            ffn=self.ffn,
            recompute=self.recompute,
            recompute_every=self.recompute_every,
        )

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        return {name: getattr(self, name) for name in _WIDTHS}

    @property
    @abstractmethod
    def depths(self) -> Mapping[str, int]:
        """Numbers of blocks by the fields that give them."""

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from divisions(
            {
                "hidden_size": (self.hidden_size, "num_heads", self.num_heads),
                "image_size": (self.image_size, "patch_size", self.patch_size),
                "video_size": (self.video_size, "patch_size", self.patch_size),
                "num_frames": (self.num_frames, "tubelet_size", self.tubelet_size),
            }
        )
        yield from filling_misfits(self.stack_of(0), self.depths)
        yield from super().misfits()
        if self.native and self.patch_dropout > 0:
            yield Misfit(("patch_dropout",), str(self.patch_dropout), "0 where sizes is 'native'", "set it to 0")


_WIDTHS = ("hidden_size", "num_heads", "mlp_ratio", "patch_size", "tubelet_size", "vocab_size", "projection_size")
