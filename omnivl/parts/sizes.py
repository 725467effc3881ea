"""Sizes and options of parts. An architecture has them as fields, or computes them from its own."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from moe.config import Activation, DenseConfig, FeedForwardConfig, without_noise
from moe.ranges import Range
from omnivl.data.sizes import PictureSizes

Recompute = Literal["none", "attention", "ffn", "block"]

MODALITIES = ("image", "video", "text")
"""Modalities of tokens, in the order of routing statistics."""


@dataclass(frozen=True)
class MomentumConfig:
    """The momentum (EMA) twins of encoders and projections.

    Attributes:
        decay: Share of itself that a twin keeps in each optimizer step; the rest comes from the module that it follows.
    """

    decay: Annotated[float, Range(0, 1)] = 0.995


@dataclass(frozen=True)
class Transformer:
    """One stack of transformer blocks.

    Attributes:
        hidden_size: Width D of its stream.
        num_heads: Attention heads; head size is hidden_size / num_heads.
        layers: Blocks.
        mlp_ratio: Inner size of the feed-forward layer over hidden_size.
        norm: Where blocks normalise: before each branch (``pre``), as ViT does, or after it (``post``), as BERT does.
        norm_eps: Added to the variance in normalisations.
        activation: Of dense perceptrons: ``gelu``, ``quick_gelu`` as in CLIP, or ``relu`` as in OPT.
        dropout: Dropout of branches.
        drop_path: Stochastic depth rate of the last block, rising linearly from 0.
        layer_scale_init: Initial LayerScale; None for none.
        ffn: The filling of the feed-forward slots.
        recompute: Activations that the backward pass recomputes: ``none``; ``attention``, those between the projections
            of attentions; ``ffn``, those within feed-forward slots; ``block``, those of whole blocks.
        recompute_every: Of this many consecutive blocks of a stack the first is recomputed; 1 for all.
        frozen_dtype: Data type of the matrices of the stack that a stage does not train. ``bf16`` takes half of the
            memory and rounds the values, in weights files and for later stages too. Scales, biases, banks of experts
            and all trained parameters stay in fp32.
    """

    hidden_size: Annotated[int, Range(1)] = 768
    num_heads: Annotated[int, Range(1)] = 12
    layers: Annotated[int, Range(0)] = 12
    mlp_ratio: Annotated[float, Range(above=0)] = 4.0
    norm: Literal["pre", "post"] = "pre"
    norm_eps: Annotated[float, Range(above=0)] = 1e-6
    activation: Activation = "gelu"
    dropout: Annotated[float, Range(0, 1)] = 0.0
    drop_path: Annotated[float, Range(0, 1)] = 0.0
    layer_scale_init: float | None = None
    ffn: FeedForwardConfig = field(default_factory=DenseConfig)
    recompute: Recompute = "none"
    recompute_every: Annotated[int, Range(1)] = 1
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def inner_size(self) -> int:
        """Inner size of a feed-forward layer."""
        return round(self.hidden_size * self.mlp_ratio)

    def at_block(self, index: int) -> "Transformer":
        """The configuration of block ``index`` of the stack."""
        return self if index % self.recompute_every == 0 else replace(self, recompute="none")

    def still(self) -> "Transformer":
        """The configuration of momentum twins: the same without anything random in a forward pass."""
        return replace(self, dropout=0.0, drop_path=0.0, ffn=without_noise(self.ffn))


@dataclass(frozen=True)
class Patches(PictureSizes):
    """Sizes and embedding options of a visual stream.

    Attributes:
        position_std: Deviation of the starting values of spatial positions.
        temporal_gain: Scale of the temporal branches' starting values. At 0 their projections and the temporal
            positions are zero, so that a clip of equal frames gives exactly the image's result. Above 0 projections
            start at this factor times the scale of other maps, temporal positions with this deviation, and motion is
            learnt many times sooner.
        patch_dropout: Share of the patches of an image (of a clip: of the same places in all frames) that training
            leaves out. Steps with a masked visual pass leave out none.
        norm_embeddings: Whether embeddings are normalised before the first block, as in CLIP.
        relative_positions: Whether attention has a bias by the relative position of two patches, as in BEiT.
    """

    position_std: float = 0.02
    temporal_gain: float = 0.0
    patch_dropout: float = 0.0
    norm_embeddings: bool = False
    relative_positions: bool = False

    @classmethod
    def of_images(cls, image_size: int, patch_size: int, num_frames: int = 1, **options: Any) -> Self:
        """Sizes for images of one size; each frame of a clip is divided into patches as an image is."""
        return cls(image_size, image_size, num_frames, patch_size, tubelet_size=1, **options)


@dataclass(frozen=True)
class Words:
    """The words of a text stream.

    Attributes:
        length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        norm_embeddings: Whether embeddings are normalised before the first block, as in BERT.
    """

    length: Annotated[int, Range(1)] = 128
    vocab_size: Annotated[int, Range(1)] = 30522
    norm_embeddings: bool = True
