"""Frozen: a vision encoder, the only part that is trained, whose output is the prefix of a frozen language model.

Source: Tsimpoukelli et al., Frozen, arXiv 2106.13884, section 3. Its code is not released.
Differs: the vision encoder is a ViT, of which the class token is mapped; in the paper it is an NF-ResNet-50, of which
    the pooled output is. The language model has OPT's options and learnt absolute positions; in the paper, one of 7
    billion parameters with relative positions. A prefix stands at the beginning of a text, not within it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Kit, Layers
from omnivl.architectures.clip import CLIP_EPS
from omnivl.architectures.grounded_language import GroundedLanguage, opt_blocks
from omnivl.chain.state import State
from omnivl.data.batch import Visual
from omnivl.parts.language import LanguageModel, Prefix, language_layers
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import Transformer


class VisualPrefix(Prefix):
    """The class token of an image to a prefix. In decoding, images are in ``memory``."""

    def before(self, state: State) -> Tensor | None:
        """The class token, ``[B, 1, D]``; see ``Prefix``."""
        seen = state.get("visual", state.get("memory"))
        return None if seen is None else seen[:, :1]


@dataclass(frozen=True)
class Frozen(GroundedLanguage):
    """Frozen. The defaults have CLIP's ViT-L/14 as encoder and OPT-6.7B.

    Attributes:
        vision: The vision encoder: CLIP's image tower, which is trained.
        prefix: Positions of the prefix, the paper's k.
    """

    kind: Literal["frozen"] = "frozen"
    prefix: Annotated[int, Range(1)] = 2
    language: LanguageModel = field(default_factory=lambda: LanguageModel(opt_blocks(4096, 32, 32), length=32))

    streams: ClassVar[tuple[str, ...]] = ("visual", "queries", "language")
    shows: ClassVar[tuple[Visual, ...]] = ("none", "image")

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        return {**super().widths, "prefix": self.prefix}

    @property
    def prefix_positions(self) -> int:
        """Positions before the tokens of a row of the language model."""
        return self.prefix

    def layers(self, kit: Kit) -> Layers:
        """Encoder, prefix, language model, losses."""
        yield from self.encoder_layers(kit.compute_dtype)
        prefix = VisualPrefix(self.vision.hidden_size, 1, self.language.blocks.hidden_size, each=self.prefix)
        yield from language_layers(self.language, prefix, kit.compute_dtype)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)


Frozen.presets = {
    "tiny": Frozen(
        vision=Transformer(hidden_size=192, num_heads=3, layers=4, norm_eps=CLIP_EPS),
        language=LanguageModel(opt_blocks(192, 3, 3), vocab_size=4096, positions=64, length=16),
        image_size=64,
        patch_size=16,
    ),
    "7b": Frozen(),
}
