"""Configuration of the model: one frozen dataclass, one table of presets."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from moe.config import Activation, DenseConfig, FeedForwardConfig
from moe.ranges import Range
from omnivl.data.sizes import InputSizes

Recompute = Literal["none", "attention", "ffn", "block"]

MODALITIES = ("image", "video", "text")
"""What tokens can be of, in the order in which routing statistics name them."""


@dataclass(frozen=True)
class MomentumConfig:
    """The momentum (EMA) twins of encoders and projections.

    Attributes:
        decay: Share of itself that a twin keeps in each optimizer step; the rest comes from what it follows.
    """

    decay: Annotated[float, Range(0, 1)] = 0.995


@dataclass(frozen=True)
class VisionConfig:
    """Details of the visual encoder in which families of pretrained weights differ; the defaults are ViT's.

    Attributes:
        activation: Of its dense perceptrons: ``gelu``, or ``quick_gelu`` as in CLIP.
        norm_eps: Added to the variance in its normalisations: 1e-6 as in Google's ViT, 1e-5 in CLIP and BLIP, 1e-12 in
            BEiT and in what transformers calls ViT.
        norm_embeddings: Whether embeddings are normalised before the first block, as in CLIP.
        relative_positions: Whether attention has a bias by how two patches lie to each other, as in BEiT.
    """

    activation: Activation = "gelu"
    norm_eps: Annotated[float, Range(above=0)] = 1e-6
    norm_embeddings: bool = False
    relative_positions: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of the chain. Defaults are the ``base`` preset.

    Attributes:
        hidden_size: Width D of all streams.
        num_heads: Attention heads; head size is hidden_size / num_heads.
        mlp_ratio: Inner size of the feed-forward layer over hidden_size.
        vision_layers: Blocks of the unified visual encoder.
        text_layers: Blocks of the text encoder.
        alignment_layers: Blocks of the visual-grounded alignment decoder, on top of the text encoder's output.
        generation_layers: Blocks of the visual-grounded generation decoder, on word embeddings, causal.
        image_size: Side of a training image in pixels.
        video_size: Side of a training frame in pixels.
        num_frames: Frames of a training clip.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per 3D patch.
        temporal_gain: What the temporal branches start with. At 0 their projections and the positions in time are zero,
            hence a clip of equal frames gives exactly what the image gives; above 0 projections start so many times as
            large as other maps do, positions in time with this deviation, and motion is learnt many times sooner.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings.
        patch_dropout: Share of the patches of an image (of a clip: of the same places in all frames) that training
            leaves out. Steps with a masked visual pass leave out none.
        drop_path: Stochastic depth rate of the last visual block, rising linearly from 0.
        dropout: Dropout in text and decoder blocks.
        text_norm: Where text and decoder blocks normalise: ``post`` as BERT does, which its weights need; ``pre``
            learns faster from random weights.
        layer_scale_init: Initial LayerScale of the visual blocks; None for none.
        vision: Details of the visual encoder, in ``towers`` only.
        momentum: Momentum twins; None builds none.
        architecture: ``towers``: a visual and a text encoder, and decoders on top of them. ``unified``: one transformer
            of ``vision_layers`` blocks for all tokens, apart and joined; ``text_layers``, ``alignment_layers`` and
            ``generation_layers`` then mean nothing.
        multiway: In the unified transformer, attention projections and norms by modality, as in BEiT-3.
        ffn: What fills the feed-forward slot.
        recompute: Activations that are not kept for the backward pass, which computes them anew: ``none``;
            ``attention``, what lies between the projections of attentions; ``ffn``, what lies within feed-forward
            slots; ``block``, whole blocks.
        recompute_every: Of every so many blocks of a stack the first is recomputed; 1 takes all.
    """

    hidden_size: Annotated[int, Range(1)] = 768
    num_heads: Annotated[int, Range(1)] = 12
    mlp_ratio: Annotated[float, Range(above=0)] = 4.0
    vision_layers: Annotated[int, Range(1)] = 12
    text_layers: Annotated[int, Range(1)] = 12
    alignment_layers: Annotated[int, Range(1)] = 12
    generation_layers: Annotated[int, Range(1)] = 12
    image_size: Annotated[int, Range(1)] = 224
    video_size: Annotated[int, Range(1)] = 112
    num_frames: Annotated[int, Range(1)] = 32
    patch_size: Annotated[int, Range(1)] = 16
    tubelet_size: Annotated[int, Range(1)] = 1
    temporal_gain: Annotated[float, Range(0)] = 0.0
    text_length: Annotated[int, Range(3)] = 128  # [CLS] word [SEP]
    vocab_size: Annotated[int, Range(1)] = 30522
    projection_size: Annotated[int, Range(1)] = 256
    patch_dropout: Annotated[float, Range(0, below=1)] = 0.0
    drop_path: Annotated[float, Range(0, 1)] = 0.0
    dropout: Annotated[float, Range(0, 1)] = 0.0
    text_norm: Literal["post", "pre"] = "post"
    layer_scale_init: float | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    momentum: MomentumConfig | None = field(default_factory=MomentumConfig)
    architecture: Literal["towers", "unified"] = "towers"
    multiway: bool = False
    ffn: FeedForwardConfig = field(default_factory=DenseConfig)
    recompute: Recompute = "none"
    recompute_every: Annotated[int, Range(1)] = 1

    @property
    def inputs(self) -> InputSizes:
        """What the data side needs to know of the sizes."""
        return InputSizes(
            image_size=self.image_size,
            video_size=self.video_size,
            num_frames=self.num_frames,
            patch_size=self.patch_size,
            tubelet_size=self.tubelet_size,
            text_length=self.text_length,
        )

    @property
    def inner_size(self) -> int:
        """Inner size of a feed-forward layer."""
        return round(self.hidden_size * self.mlp_ratio)

    def at_block(self, index: int) -> "ModelConfig":
        """The configuration as block ``index`` of a stack has it."""
        return self if index % self.recompute_every == 0 else replace(self, recompute="none")

    def time_positions(self, num_frames: int) -> int:
        """Time positions of a clip of ``num_frames``; an image (one frame) has one."""
        return max(num_frames // self.tubelet_size, 1)

    def grid(self, is_video: bool) -> tuple[int, int]:
        """Patches per side of a training image or training frame, (rows, columns)."""
        return self.inputs.grid(is_video)


PresetName = Literal["tiny", "small", "base", "large", "giant"]
