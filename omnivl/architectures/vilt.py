"""ViLT: one transformer over words and patches, without separate encoders.

Source: Kim et al., ViLT, arXiv 2102.03334.
Differs: images of a step are of one square size; no patches are left out at random.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.foreign import read_json
from omnivl.architectures.misfits import divisions, stack_misfits, twin_misfits
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import Visual
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit, ModelError
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.vilt import EmbedPair, FusedLayer, FusedNorm


@dataclass(frozen=True)
class ViLT(Architecture):
    """ViLT. The defaults are ViLT-B/32, the paper's.

    Attributes:
        blocks: The transformer; its dropout also acts on the embeddings.
        words: Sizes of the texts.
        image_size: Side of an image in pixels.
        patch_size: Side of a patch in pixels.
    """

    kind: Literal["vilt"] = "vilt"
    blocks: Transformer = field(default_factory=Transformer)
    words: Words = field(default_factory=lambda: Words(length=40))
    image_size: Annotated[int, Range(1)] = 384
    patch_size: Annotated[int, Range(1)] = 32

    streams: ClassVar[tuple[str, ...]] = ("fused", "fused_visual")
    shows: ClassVar[tuple[Visual, ...]] = ("image",)
    vocabulary: ClassVar[tuple[str, ...]] = ("words", "vocab_size")

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.words.length, self.blocks.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of images and patches."""
        return Patches.of_images(self.image_size, self.patch_size, **self.shown_as)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        return HeadSizes(
            widths=dict.fromkeys(self.streams, self.blocks.hidden_size),
            text_length=self.words.length,
            vocab_size=self.words.vocab_size,
            projection_size=0,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The transformer."""
        return {"fused": self.blocks}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        blocks = widths_of({"blocks": self.blocks})
        return {**blocks, "words.vocab_size": self.words.vocab_size, "patch_size": self.patch_size}

    @property
    def has_routers(self) -> bool:
        """False: no block encodes pictures or texts alone."""
        return False

    def layers(self, kit: Kit) -> Layers:
        """Embeddings, joined rows, blocks, heads."""
        blocks, patches = self.blocks, self.patches
        yield "embed", EmbedPair(patches, self.words, blocks, kit.tokens.pad, kit.compute_dtype)
        yield "join", JoinRows(kit.objectives, kit.gather, joins_inputs=True, concatenates=True)
        for index in range(blocks.layers):
            yield f"fused_{index:02d}", FusedLayer(index, blocks, self.words.length, patches)
        yield "fused_norm", FusedNorm(blocks)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        blocks = self.blocks
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        yield from stack_misfits("blocks", blocks)
        for name, only in (("norm", "pre"), ("activation", "gelu")):
            if getattr(blocks, name) != only:
                yield Misfit(
                    ("blocks", name), repr(getattr(blocks, name)), f"{only!r} in 'vilt'", f"set it to {only!r}"
                )
        if self.words.length < 3:
            yield Misfit(("words", "length"), str(self.words.length), "3 or more: [CLS] word [SEP]", "raise it")
        yield from twin_misfits(self.kind, self.momentum)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' ``ViltModel`` and classes built on it, or of ``ViTModel``, which ViLT starts from.

        Args:
            weights: By the folder's names.
            path: The folder, for messages.

        Returns:
            None if they are of neither. The head of masked words has a place here; other heads keep their names.

        Raises:
            ModelError: The blocks have another number of heads or another activation than the weights'.
        """
        given = {re.sub(r"^vil?t\.", "", name): tensor for name, tensor in weights.items()}
        said = read_json(path / "config.json")
        if said.get("model_type", "vilt") not in ("vilt", "vit") or not given.keys() >= TELLING:
            return None
        self._refuse_options(said, path)
        found: dict[str, Tensor] = {}
        for name in [name for name in given if ".attention.attention.query." in name]:
            parts = [given.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
            found[_own_name(name)] = torch.cat(parts)
        for name, tensor in given.items():
            own = _own_name(name)
            found[own] = _FLATTENED[own](tensor) if own in _FLATTENED else tensor
        if "losses.vocabulary.transform.weight" in found:
            # There the last map is tied to the word embedding, and may be missing in the file.
            found.setdefault("losses.vocabulary.decoder.weight", found["embed.block.text.words"])
        return found

    def _refuse_options(self, said: Mapping[str, Any], path: Path) -> None:
        """Refuses weights whose configuration differs from ours in an option that shapes do not show."""
        wanted = {
            "num_heads": (self.blocks.num_heads, said.get("num_attention_heads", self.blocks.num_heads)),
            "activation": (self.blocks.activation, said.get("hidden_act", self.blocks.activation)),
        }
        for name, (own, theirs) in wanted.items():
            if own != theirs:
                raise ModelError(
                    f"{path}: model.blocks.{name}: got {own!r}; allowed {theirs!r} with these weights; set it, or give "
                    "other weights"
                )


_ENDING = r"\.(weight|bias)$"
_NAMES: Mapping[str, str] = {
    r"embeddings\.cls_token$": "embed.block.visual.class_token",
    r"embeddings\.position_embeddings$": "embed.block.visual.positions",
    r"embeddings\.patch_embeddings\.projection" + _ENDING: r"embed.block.visual.patches.\1",
    r"embeddings\.text_embeddings\.word_embeddings\.weight$": "embed.block.text.words",
    r"embeddings\.text_embeddings\.position_embeddings\.weight$": "embed.block.text.positions",
    r"embeddings\.text_embeddings\.token_type_embeddings\.weight$": "embed.block.text.types",
    r"embeddings\.text_embeddings\.LayerNorm" + _ENDING: r"embed.block.text.norm.\1",
    r"embeddings\.token_type_embeddings\.weight$": "embed.block.modalities",
    r"layernorm" + _ENDING: r"fused_norm.block.norm.\1",
    r"pooler\.dense" + _ENDING: r"fused_norm.block.pooler.\1",
    r"mlm_score\.transform\.dense" + _ENDING: r"losses.vocabulary.transform.\1",
    r"mlm_score\.transform\.LayerNorm" + _ENDING: r"losses.vocabulary.norm.\1",
    r"mlm_score\.decoder\.weight$": "losses.vocabulary.decoder.weight",
    r"mlm_score\.(?:decoder\.)?bias$": "losses.vocabulary.decoder.bias",
}
_IN_BLOCKS: Mapping[str, str] = {
    "layernorm_before": "norm1.shared",
    "attention.attention.query": "qkv.shared",
    "attention.output.dense": "out.shared",
    "layernorm_after": "norm2.shared",
    "intermediate.dense": "ffn.fc1",
    "output.dense": "ffn.fc2",
}
TELLING = {"embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.0.layernorm_before.weight"}
"""Names that weights of both classes have."""
_FLATTENED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "embed.block.visual.class_token": torch.flatten,
    "embed.block.visual.positions": lambda table: table[0],
    "embed.block.visual.patches.weight": lambda kernel: kernel.flatten(1),
}
"""Tensors with more dimensions in transformers."""


def _own_name(name: str) -> str:
    """Our name of a tensor of transformers; its own name if there is no place for it."""
    if found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name):
        index, part, ending = found.groups()
        return f"fused_{int(index):02d}.block.{_IN_BLOCKS[part]}.{ending}" if part in _IN_BLOCKS else name
    for pattern, own in _NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name)
    return name
