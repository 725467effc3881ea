"""CoCa: an image encoder with attentional poolers, and a causal text decoder whose lower half sees no image.

Shapes: L text positions, P width of what poolers gather.

Source: Yu et al., CoCa, arXiv 2205.01917, section 3.2; open_clip's ``CoCa``, with which outputs, losses and gradients
    agree. The paper's code is not released.
Differs: starting values of matrices are the project's (``moe.linear``). The closing token of a text and its position
    are one vector, since only their sum is read. Texts to write start with the same token as texts to contrast.
    From open_clip: with ``cascade`` and ``parallel`` the poolers may be of another width than the encoder, and the
    defaults are the paper's: one query for contrast, and decoder blocks with one feed-forward layer
    (``alternates`` has open_clip's two).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.config import DenseConfig
from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.coca_names import from_open_clip
from omnivl.architectures.misfits import (
    activation_misfits,
    divisions,
    norm_misfits,
    reading_misfits,
    stack_misfits,
    twin_misfits,
)
from omnivl.chain.demands import CLEAN
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.decoder import GenerationBlock
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.losses import Losses
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.pooled import AlternatingBlock, PooledBlock
from omnivl.parts.poolers import JoinPooled, Pooling, PoolVisual, contrast_name
from omnivl.parts.project import Project
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.unimodal import CloseTexts, Closing, EmbedClosed, UnimodalLayer
from omnivl.parts.vit import VisualBlock


@dataclass(frozen=True)
class CoCa(Architecture):
    """CoCa. The defaults are the preset ``base``, the paper's.

    Attributes:
        vision: The image encoder.
        text: The lower half of the text decoder, which sees no image.
        multimodal: The upper half, with cross-attention; of the width of ``text``, which poolers have too.
        pooling: How an image is pooled for contrast. ``cascade``: by one query that attends to what the queries for
            captions gather. ``parallel``: by one query that attends to the encoder's positions. ``joint``: by one more
            query of a single pooler, as in open_clip's released models.
        caption_queries: Queries whose results captions look at.
        pooler_heads: Heads of the poolers' attention.
        alternates: Whether a block of ``multimodal`` is two, one with self-attention and one with cross-attention, each
            with a feed-forward layer, as in open_clip; false: one with a single feed-forward layer.
        closing: What the token that closes a text attends to: the text and itself (``own``); or (``released``) the
            text and one padding behind it, as in open_clip's released models.
        image_size: Side of an image, or of a frame of a clip, in pixels.
        num_frames: Frames of a training clip. Each is encoded as an image; poolers attend to all of them.
        patch_size: Side of a patch in pixels.
        text_length: Token positions per text, special tokens included, without the closing token.
        vocab_size: Rows of the word embedding.
        projection_size: Size of the contrastive embeddings.
    """

    kind: Literal["coca"] = "coca"
    vision: Transformer = field(default_factory=lambda: _stack(768, 12, 12))
    text: Transformer = field(default_factory=lambda: _stack(768, 12, 12))
    multimodal: Transformer = field(default_factory=lambda: _stack(768, 12, 12))
    pooling: Pooling = "cascade"
    caption_queries: Annotated[int, Range(1)] = 256
    pooler_heads: Annotated[int, Range(1)] = 12
    alternates: bool = False
    closing: Closing = "own"
    image_size: Annotated[int, Range(1)] = 288
    num_frames: Annotated[int, Range(1)] = 8
    patch_size: Annotated[int, Range(1)] = 18
    text_length: Annotated[int, Range(3)] = 64  # start, a word, end
    vocab_size: Annotated[int, Range(1)] = 64000
    projection_size: Annotated[int, Range(1)] = 768

    streams: ClassVar[tuple[str, ...]] = ("visual", "text", "embedding", "generation")

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.vision.hidden_size)

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
    def heads(self) -> HeadSizes:
        """Sizes for heads; of images they read what poolers gather."""
        return HeadSizes(
            widths=dict.fromkeys(("visual", "text", "generation"), self.text.hidden_size),
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The image encoder and both halves of the decoder."""
        return {"visual": self.vision, "text": self.text, "generation": self.multimodal}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({"vision": self.vision, "text": self.text, "multimodal": self.multimodal})
        return {**{name: getattr(self, name) for name in _WIDTHS}, **stacks}

    def layers(self, kit: Kit) -> Layers:
        """Image encoder and poolers, the lower half, projections, the upper half, losses."""
        patches, size, length = self.patches, self.text.hidden_size, self.text_length
        towers = patches, self.vision, self.words, self.text
        yield "embed", EmbedClosed(*towers, kit.tokens, kit.compute_dtype, self.closing)
        for index in range(self.vision.layers):
            block = VisualBlock(index, self.vision, patches, block=ImageBlock, may_shorten=False)
            yield f"visual_{index:02d}", block
        pool = self.pooling, self.caption_queries, size, self.pooler_heads
        yield "visual_pool", PoolVisual(*pool, self.vision, patches)
        for index in range(self.text.layers):
            yield f"text_{index:02d}", UnimodalLayer(index, self.text, length)
        yield "text_norm", CloseTexts(self.text)
        pools = {stream: partial(_contrasted, stream) for stream in ("visual", "text")}
        yield "contrast", Project(self.heads, kit.objectives, bias=False, pools=pools)
        yield "join", JoinPooled(kit.objectives, kit.gather)
        form = AlternatingBlock if self.alternates else PooledBlock
        for index in range(self.multimodal.layers):
            writer = GenerationBlock(index, self.multimodal, length, patches, block=form, seen=self.caption_queries)
            yield f"generation_{index:02d}", writer
        vocabulary = partial(VocabularyHead, transforms=False, bias=False)
        fillings = self.fillings
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=fillings, vocabulary=vocabulary)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of open_clip's ``CoCa``.

        Raises:
            ModelError: The file beside them asks for other options than the model has.
        """
        own = {name: getattr(self, name) for name in ("pooling", "pooler_heads", "alternates", "closing")}
        return from_open_clip(weights, path, self.vision, self.text, self.multimodal, own)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        stacks = {name: getattr(self, name) for name in ("vision", "text", "multimodal")}
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for name, stack in stacks.items():
            if name != "multimodal" or stack.layers:  # without it there are no captions
                yield from stack_misfits(name, stack)
            yield from activation_misfits(name, stack)
            yield from norm_misfits(name, stack, "pre", repr(self.kind))
        size = self.text.hidden_size
        yield from divisions({"text.hidden_size": (size, "pooler_heads", self.pooler_heads)})
        if self.multimodal.hidden_size != size:
            got, allowed = str(self.multimodal.hidden_size), f"text.hidden_size {size}"
            yield Misfit(("multimodal", "hidden_size"), got, allowed, "make them equal")
        for name in ("text", "multimodal"):
            yield from reading_misfits(name, stacks[name])
        if self.alternates and not isinstance(self.multimodal.ffn, DenseConfig):
            got, change = repr(self.multimodal.ffn.kind), "set it to 'dense', or alternates to false"
            yield Misfit(("multimodal", "ffn", "kind"), got, "'dense' where blocks alternate", change)
        yield from twin_misfits(self.kind, self.momentum)

    def written_by(self) -> tuple[Transformer, ...]:
        """Both halves: captions pass the lower one too."""
        return (self.multimodal, self.text) if self.multimodal.layers else (self.multimodal,)


def _contrasted(name: str, stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """What stands for each row of a segment in contrast, ``[R, P]``."""
    return state[contrast_name(name)][state.layout.segments(name)[segment]]


_WIDTHS = ("patch_size", "vocab_size", "projection_size", "caption_queries", "pooling")


def _stack(width: int, heads: int, layers: int, inner: int | None = None) -> Transformer:
    """A stack with CLIP's options."""
    ratio = 4.0 if inner is None else inner / width
    return Transformer(hidden_size=width, num_heads=heads, layers=layers, mlp_ratio=ratio, norm_eps=CLIP_EPS)


def _of_paper(width: int, heads: int, depths: tuple[int, int], inner: int) -> CoCa:
    """A row of the paper's table 1; heads of poolers as many as those of blocks, which it does not say."""
    vision, text = (_stack(width, heads, depth, inner) for depth in depths)
    return CoCa(vision=vision, text=text, multimodal=text, pooler_heads=heads, projection_size=width)


CoCa.presets = {
    "tiny": CoCa(
        vision=_stack(192, 3, 4),
        text=_stack(128, 2, 2),
        multimodal=_stack(128, 2, 2),
        caption_queries=16,
        pooler_heads=2,
        image_size=64,
        num_frames=8,
        patch_size=8,
        text_length=16,
        vocab_size=4096,
        projection_size=128,
    ),
    "base": CoCa(),
    "large": _of_paper(1024, 16, (24, 12), 4096),
    "full": _of_paper(1408, 16, (40, 18), 6144),
}
