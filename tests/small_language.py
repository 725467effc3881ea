"""A small architecture with a language model behind queries: patches are embedded, some of them are the queries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from omnivl.architectures.base import Architecture, Kit, Layers
from omnivl.architectures.misfits import language_misfits
from omnivl.chain.chain import ChainLayer
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextInput
from omnivl.errors import Misfit
from omnivl.parts.block import BlockLayer
from omnivl.parts.embed import pixel_values
from omnivl.parts.language import LanguageModel, Prefix, language_layers, language_order
from omnivl.parts.linear import Linear
from omnivl.parts.losses import Losses
from omnivl.parts.opt_names import language_from_opt
from omnivl.parts.sizes import Patches, Transformer

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
NEWLINE = 5
QUERIES, QUERY_SIZE = 3, 12


class LetterTokenizer:
    """One token per letter; a line's end is one of its own."""

    special = TOKENS

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        rows = [[TOKENS.cls, *map(self._id, text[: length - 2]), TOKENS.sep] for text in texts]
        return np.array([row + [TOKENS.pad] * (length - len(row)) for row in rows], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("\n" if one == NEWLINE else chr(one) for one in ids if one >= NEWLINE)

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        everywhere = np.ones(TOKENS.vocab_size, dtype=np.bool_)
        return everywhere, everywhere

    def _id(self, letter: str) -> int:
        return NEWLINE if letter == "\n" else 6 + ord(letter) % 34


class PatchQueries(BlockLayer):
    """The first patches of an image, mapped, as visual features and, where they are read, as queries."""

    stack, level = "embed", -1

    def __init__(self, patch_size: int, dtype: torch.dtype) -> None:
        super().__init__("embed", lambda still: Linear(3 * patch_size**2, QUERY_SIZE))
        self.patch_size, self.dtype = patch_size, dtype

    def acts(self, layout: StepLayout) -> bool:
        return bool(layout.visual) or "queries" in layout.fields

    def forward(self, state: State) -> State:
        if "frames" in state and state.layout.visual:
            pixels = pixel_values(state["frames"], self.patch_size, self.dtype)[:, 0, :QUERIES]
            found = self.run(pixels)
            return state.updated(visual=found, queries=found)
        if "memory" in state and not any(name.endswith("/cross") for name in state):
            return state.updated(queries=state["memory"])
        return state


@dataclass(frozen=True)
class Writer(Architecture):
    """Queries, a language model, losses."""

    kind: Literal["writer"] = "writer"  # type: ignore[assignment]
    language: LanguageModel = field(
        default_factory=lambda: LanguageModel(
            blocks=Transformer(hidden_size=16, num_heads=2, layers=3, activation="relu", norm_eps=1e-5),
            vocab_size=40,
            positions=20,
            length=8,
        )
    )

    streams: ClassVar[tuple[str, ...]] = ("visual", "queries", "language")
    readers: ClassVar[tuple[tuple[str, ...], ...]] = (("language",),)

    @property
    def patches(self) -> Patches:
        return Patches(image_size=8, video_size=8, num_frames=1, patch_size=4, tubelet_size=1)

    @property
    def inputs(self) -> InputSizes:
        return InputSizes.of(self.patches, 6)

    @property
    def heads(self) -> HeadSizes:
        widths = {"visual": QUERY_SIZE, "language": self.language.blocks.hidden_size}
        return HeadSizes(widths, 6, self.language.vocab_size, 0, 4, 1, 8)

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        return {"language": self.language.blocks}

    @property
    def text_inputs(self) -> Mapping[str, TextInput]:
        return {"language": self.language.text_input}

    def layers(self, kit: Kit) -> Layers:
        embed: ChainLayer = PatchQueries(self.patches.patch_size, kit.compute_dtype)
        yield "embed", embed
        prefix = Prefix(QUERY_SIZE, QUERIES, self.language.blocks.hidden_size)
        yield from language_layers(self.language, prefix, kit.compute_dtype)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather)

    def order(self, names: Sequence[str]) -> Sequence[str]:
        return language_order(names)

    def misfits(self) -> Iterator[Misfit]:
        return language_misfits(self.language, QUERIES)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
        return language_from_opt(weights)
