"""SimVLM: an encoder over image tokens and the beginning of a text, and a decoder that writes the rest.

Source: Wang et al., SimVLM, arXiv 2108.10904, section 3. Its code is not released.
Differs: sizes and the stages of the convolutional stem are from memory of its section 3.2. Groups are normalised there
    instead of the batch. Image tokens have learnt positions, and no bias by relative position. The map from hidden
    states to words is not tied to the word embedding. Texts without images are not learnt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.misfits import divisions, native_misfits, reading_misfits, stack_misfits, twin_misfits
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.conv_stem import STRIDE
from omnivl.parts.decoder import GenerationBlock
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.prefix import EmbedPrefix, PrefixLayer, PrefixNorm
from omnivl.parts.sizes import Patches, Transformer, Words


@dataclass(frozen=True)
class SimVLM(Architecture):
    """SimVLM. The defaults are the preset ``base``.

    Attributes:
        encoder: The stack over words and image tokens.
        decoder: The causal stack that looks at them, of the same width.
        stem_width: Channels of the stem and of the first stage's 3 x 3 convolutions.
        stem_blocks: Bottleneck blocks of each of three stages: 3, 4, 23 as in ResNet-101, 3, 8, 36 as in ResNet-152.
        image_size: Side of an image in pixels; 16 of them make a token.
        text_length: Token positions per text, special tokens included.
        vocab_size: Rows of the word embedding.
    """

    kind: Literal["simvlm"] = "simvlm"
    encoder: Transformer = field(default_factory=Transformer)
    decoder: Transformer = field(default_factory=Transformer)
    stem_width: Annotated[int, Range(1)] = 64
    stem_blocks: tuple[int, int, int] = (3, 4, 23)
    image_size: Annotated[int, Range(1)] = 224
    text_length: Annotated[int, Range(3)] = 256  # start, a word, end
    vocab_size: Annotated[int, Range(1)] = 32000

    streams: ClassVar[tuple[str, ...]] = ("fused", "generation", "fused_generation")
    shows: ClassVar[tuple[Visual, ...]] = ("image",)

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.text_length, self.encoder.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of images; a patch is what becomes a token."""
        return Patches.of_images(self.image_size, STRIDE, **self.shown_as)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths=dict.fromkeys(("fused", "generation"), self.encoder.hidden_size),
            text_length=self.text_length,
            vocab_size=self.vocab_size,
            projection_size=0,
            patch_size=STRIDE,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The encoder and the decoder."""
        return {"fused": self.encoder, "generation": self.decoder}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        stacks = widths_of({"encoder": self.encoder, "decoder": self.decoder})
        return {**{name: getattr(self, name) for name in ("stem_width", "stem_blocks", "vocab_size")}, **stacks}

    @property
    def has_routers(self) -> bool:
        """False: no block encodes pictures or texts alone."""
        return False

    def layers(self, kit: Kit) -> Layers:
        """Embeddings, joined rows, encoder, decoder, losses."""
        encoder, decoder, patches, length = self.encoder, self.decoder, self.patches, self.text_length
        words, stem = Words(length, self.vocab_size, norm_embeddings=False), (self.stem_width, self.stem_blocks)
        yield "embed", EmbedPrefix(patches, *stem, words, encoder, kit.tokens.pad, kit.compute_dtype)
        yield "join", JoinRows(kit.objectives, kit.gather, joins_inputs=True, concatenates=True)
        for index in range(encoder.layers):
            yield f"fused_{index:02d}", PrefixLayer(index, encoder, length, patches)
        yield "fused_norm", PrefixNorm(encoder)
        rows, columns = patches.grid(is_video=False)
        for index in range(decoder.layers):
            block = GenerationBlock(index, decoder, length, patches, seen=length + rows * columns)
            yield f"generation_{index:02d}", block
        vocabulary = partial(VocabularyHead, transforms=False, bias=False)
        fillings = self.fillings
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=fillings, vocabulary=vocabulary)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from native_misfits(self.kind, self.sizes)
        yield from divisions({"image_size": (self.image_size, "the stem's stride", STRIDE)})
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            yield from stack_misfits(name, stack)
            for option, only in (("norm", "pre"), ("activation", "gelu")):
                if (value := getattr(stack, option)) != only:
                    yield Misfit((name, option), repr(value), f"{only!r} in 'simvlm'", f"set it to {only!r}")
        if self.encoder.hidden_size != self.decoder.hidden_size:
            got, allowed = str(self.decoder.hidden_size), f"encoder.hidden_size {self.encoder.hidden_size}"
            yield Misfit(("decoder", "hidden_size"), got, allowed, "make them equal")
        yield from reading_misfits("decoder", self.decoder)
        if min(self.stem_blocks) < 1:
            got, change = str(list(self.stem_blocks)), "raise them, e.g. to [3, 4, 23]"
            yield Misfit(("stem_blocks",), got, "1 or more in each stage", change)
        yield from twin_misfits(self.kind, self.momentum)


def _of_widths(width: int, heads: int, layers: int, blocks: tuple[int, int, int]) -> SimVLM:
    stack = Transformer(hidden_size=width, num_heads=heads, layers=layers)
    return SimVLM(encoder=stack, decoder=stack, stem_blocks=blocks)


SimVLM.presets = {
    "tiny": replace(_of_widths(128, 2, 2, (1, 1, 1)), stem_width=16, image_size=64, text_length=16, vocab_size=4096),
    "base": SimVLM(),
    "large": _of_widths(1024, 16, 24, (3, 4, 23)),
    "huge": _of_widths(1280, 16, 32, (3, 8, 36)),
}
