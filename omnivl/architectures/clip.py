"""CLIP: an image tower and a causal text tower of different widths, each with a projection on top.

Shapes: B samples, T frames, L text positions.

Source: Radford et al., CLIP, arXiv 2103.00020, sections 2.4 and 2.5, and its released code.
Differs: starting values of matrices are the project's (``moe.linear``). Texts are pooled at the tokenizer's first end
    token; the released code takes the largest id, which is that token in its vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.clip_names import from_transformers, to_transformers, unmet_options
from omnivl.architectures.foreign import CLIP_PIXELS, Foreign, read_json, read_pixels, refuse_stack, refuse_unmet
from omnivl.architectures.misfits import (
    activation_misfits,
    divisions,
    norm_misfits,
    stack_misfits,
)
from omnivl.chain.chain import Chain
from omnivl.chain.sizes import HeadSizes
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import Misfit, ModelError
from omnivl.parts.bert import TextBlock
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.plain_vit import ImageBlock, frame_tokens
from omnivl.parts.project import Project, last_token
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.towers import EmbedTowers
from omnivl.parts.vit import VisualBlock, VisualNorm

CLIP_EPS = 1e-5


@dataclass(frozen=True)
class CLIP(Architecture):
    """CLIP. The defaults are the preset ``b16``, the paper's ViT-B/16.

    Attributes:
        vision: The image tower. CLIP's own weights have the activation ``quick_gelu``.
        text: The text tower, causal.
        image_size: Side of an image, or of a frame of a clip, in pixels.
        num_frames: Frames of a training clip. Each is encoded as an image; a clip's embedding is the mean of its
            frames' embeddings.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
        projection_size: Size P of the contrastive embeddings.
    """

    kind: Literal["clip"] = "clip"
    vision: Transformer = field(default_factory=lambda: _tower(768, 12, 12))
    text: Transformer = field(default_factory=lambda: _tower(512, 8, 12))
    image_size: Annotated[int, Range(1)] = 224
    num_frames: Annotated[int, Range(1)] = 8
    patch_size: Annotated[int, Range(1)] = 16
    text_length: Annotated[int, Range(3)] = 77  # start, a word, end
    vocab_size: Annotated[int, Range(1)] = 49408
    projection_size: Annotated[int, Range(1)] = 512

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding")

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.hidden_size)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths={"visual": self.vision.hidden_size, "text": self.text.hidden_size},
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def patches(self) -> Patches:
        """Sizes of the visual stream."""
        return Patches.of_images(
            self.image_size, self.patch_size, self.num_frames, norm_embeddings=True, **self.shown_as
        )

    @property
    def words(self) -> Words:
        """Sizes of the text stream."""
        return Words(length=self.text_length, vocab_size=self.vocab_size, norm_embeddings=False)

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """Both towers."""
        return {"visual": self.vision, "text": self.text}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        towers = widths_of({"vision": self.vision, "text": self.text})
        return {**{name: getattr(self, name) for name in _WIDTHS}, **towers}

    def layers(self, kit: Kit) -> Layers:
        """Towers, projections, losses."""
        patches, twins = self.patches, kit.momentum
        reads = partial(up_to_end, tokens=kit.tokens)
        towers = patches, self.vision, self.words, self.text
        yield "embed", EmbedTowers(*towers, reads, kit.compute_dtype, bias=False, momentum=twins)
        for index in range(self.vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, self.vision, patches, twins, block=ImageBlock)
        yield "visual_norm", VisualNorm(self.vision, twins)
        for index in range(self.text.layers):
            yield f"text_{index:02d}", TextBlock(index, self.text, self.text_length, twins, causal=True)
        pools = {"visual": frame_tokens, "text": last_token}
        yield "contrast", Project(self.heads, kit.objectives, self.momentum, bias=False, pools=pools)
        yield "join", JoinRows(kit.objectives, kit.gather)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings, momentum=self.momentum)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' ``CLIPModel``, or of its vision model.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        if "vision_model.pre_layrnorm.weight" not in weights:
            return None
        config = read_json(path / "config.json") if path.is_dir() else {}
        refuse_unmet(path, unmet_options(config, self.vision, self.text))
        return from_transformers(weights, read_pixels(path, CLIP_PIXELS))

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign:
        """The model as transformers' ``CLIPModel``.

        Raises:
            ModelError: The towers have an option that the class lacks, or the class would not find the end token's id.
        """
        for name, tower in (("vision", self.vision), ("text", self.text)):
            refuse_stack(name, tower, "pre", "CLIPModel")
        if tokens.sep == 2:
            raise ModelError(
                "tokenizer: got the end token id 2, at which transformers' CLIPModel takes the largest id of a text; "
                "allowed is another id; use another tokenizer, or leave --format out"
            )
        return to_transformers(self.heads, self.image_size, (self.vision, self.text), chain, tokens)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        towers = {"vision": self.vision, "text": self.text}
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name, tower in towers.items():
            yield from stack_misfits(name, tower)
            yield from norm_misfits(name, tower, "pre", repr(self.kind))
            yield from activation_misfits(name, tower)
        for option, still in (("drop_path", 0.0), ("layer_scale_init", None)):
            if (value := getattr(self.text, option)) != still:
                yield Misfit(("text", option), str(value), "0" if still == 0.0 else "null", "the text tower has none")

    def token_misfits(self, tokens: SpecialTokens) -> Iterator[Misfit]:
        """The end of a text is its first end token, so that padding may be the same, but the start may not."""
        if tokens.cls == tokens.sep:
            got = f"a tokenizer whose start is its end token, id {tokens.cls}"
            allowed = f"two tokens with architecture {self.kind!r}, which would read no word"
            yield Misfit(("tokenizer",), got, allowed, "give it a start token of its own, or use another tokenizer")


_WIDTHS = ("patch_size", "vocab_size", "projection_size")


def up_to_end(token_ids: Tensor, tokens: SpecialTokens) -> Tensor:
    """Bool ``[R, L]``: true up to and including a text's first end token; the same token may serve as padding."""
    ends = token_ids == tokens.sep
    return (ends.long().cumsum(1) - ends.long() == 0) & (ends | (token_ids != tokens.pad))


def _tower(width: int, heads: int, layers: int) -> Transformer:
    """A tower with CLIP's options."""
    return Transformer(hidden_size=width, num_heads=heads, layers=layers, norm_eps=CLIP_EPS)


CLIP.presets = {
    "tiny": CLIP(
        vision=_tower(192, 3, 6),
        text=_tower(128, 2, 4),
        image_size=64,
        num_frames=8,
        patch_size=8,
        text_length=16,
        vocab_size=4096,
        projection_size=128,
    ),
    "b32": CLIP(patch_size=32),
    "b16": CLIP(),
    "l14": CLIP(vision=_tower(1024, 16, 24), text=_tower(768, 12, 12), patch_size=14, projection_size=768),
}
