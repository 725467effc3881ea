"""The base class of architectures: a frozen configuration that builds its own layers.

A new architecture is one file with one such class, one entry in the union in ``omnivl.architectures`` and one plan.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from torch import Tensor

from moe.config import FeedForwardConfig, LIMoEConfig, MoMELIMoEConfig, for_any_machine
from moe.feed_forward import is_routed
from omnivl.architectures.foreign import Foreign
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Objective
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import VISUALS, Visual
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextInput
from omnivl.errors import Misfit, ModelError
from omnivl.parts.sizes import MomentumConfig, Recompute, Transformer

_Part = TypeVar("_Part")

Layers = Iterator[tuple[str, ChainLayer]]
"""Layers with their names, in the order in which they are built and, unless ``Architecture.order`` differs, run."""


@dataclass(frozen=True)
class Kit:
    """Inputs of ``Architecture.layers`` besides the architecture's own sizes.

    Attributes:
        objectives: The stage's objectives.
        tokens: Special tokens of the tokenizer.
        gather: How to see the other replicas.
        compute_dtype: fp32 or bf16: the dtype of activations between the first layer and the losses.
        momentum: Of the twins; None if no objective reads any, or if the architecture has none.
    """

    objectives: tuple[Objective, ...]
    tokens: SpecialTokens
    gather: Gather
    compute_dtype: torch.dtype
    momentum: MomentumConfig | None

    @property
    def writes_from_texts(self) -> bool:
        """Whether generated texts attend to fused rows, so that their width is the decoder's memory size."""
        asked = (demands for objective in self.objectives for demands in objective.demands_of_kinds.values())
        return any(demands.writes_from_fused for demands in asked)

    def momentum_of(self, stream: str) -> MomentumConfig | None:
        """Momentum of the twins of one stream's blocks; None if no objective reads these."""
        return self.momentum if any(stream in objective.twins for objective in self.objectives) else None


@dataclass(frozen=True)
class Architecture(ABC):
    """Base of all architectures: frozen dataclasses, discriminated in a plan by ``kind: Literal[...]``.

    Attributes:
        kind: Name of the architecture in plans.
        momentum: Momentum twins; None builds none.
        sizes: ``fixed``: pictures and clips are cropped and resized to squares of one side. ``native``: each keeps its
            own size and ratio, rounded to whole patches, and is reduced only where it has more patches than a square
            of the training side. Data workers give every replica the same visual work. Encoders of pictures compute no
            padding in training; rows that join patches and words, and evaluations, leave it out on a CPU alone.
            ``stretched``: whole pictures and clips are resized to squares, whatever their ratio, in evaluation and
            where training does not crop, as ALBEF, BLIP and X-VLM do.

    Class attributes: ``streams``, the streams that the chain can have (see ``omnivl.chain.demands``); ``shows``, visual
    modalities of samples; ``presets``, configurations that a plan's ``model.preset`` may name; ``vocabulary``, path in
    the configuration of the tokenizer's vocabulary size; ``readers``, sections of stacks that may have a separate
    tokenizer, each with fields ``tokenizer`` and ``vocab_size``; ``starts_from``, stacks whose blocks start as copies
    of another stack's if the earlier stage has none of theirs.
    """

    streams: ClassVar[tuple[str, ...]]
    shows: ClassVar[tuple[Visual, ...]] = VISUALS
    presets: ClassVar[Mapping[str, Any]] = {}
    vocabulary: ClassVar[tuple[str, ...]] = ("vocab_size",)
    readers: ClassVar[tuple[tuple[str, ...], ...]] = ()
    starts_from: ClassVar[Mapping[str, str]] = {}

    kind: str = ""
    momentum: MomentumConfig | None = None
    sizes: Literal["fixed", "native", "stretched"] = "fixed"

    @property
    def native(self) -> bool:
        """Whether pictures and clips keep their own sizes."""
        return self.sizes == "native"

    @property
    def shown_as(self) -> dict[str, bool]:
        """The options of ``PictureSizes`` that ``sizes`` sets."""
        return {"native": self.native, "stretched": self.sizes == "stretched"}

    @property
    @abstractmethod
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""

    @property
    @abstractmethod
    def heads(self) -> HeadSizes:
        """Sizes for heads."""

    @property
    @abstractmethod
    def stacks(self) -> Mapping[str, Transformer]:
        """The stacks of blocks, by the prefix of their layers' names."""

    @property
    def offers(self) -> tuple[str, ...]:
        """The streams of the chain as configured; no ``generation`` if its stack has no blocks."""
        writing = self.written_by()
        silent = bool(writing) and not any(stack.layers for stack in writing)
        return tuple(stream for stream in self.streams if not (silent and stream.endswith("generation")))

    @property
    def text_inputs(self) -> Mapping[str, TextInput]:
        """How stacks that do not read the batch's ``token_ids`` read texts, by stack."""
        return {}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        heads = self.heads
        return {"vocab_size": heads.vocab_size, "projection_size": heads.projection_size, **widths_of(self.stacks)}

    @abstractmethod
    def layers(self, kit: Kit) -> Layers:
        """Builds the layers one after the other; the first embeds, the last holds the heads."""

    def order(self, names: Sequence[str]) -> Sequence[str]:
        """Names of the layers in the order of the forward pass, in which one may occur twice."""
        return names

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of another library under this architecture's names, heads included.

        Args:
            weights: By the folder's names.
            path: The folder, for messages.

        Returns:
            None if the weights are of no family that the architecture knows.

        Raises:
            ModelError: They are of a known family, but the architecture as configured computes something else.
        """
        return None

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign | None:
        """The model as a class of another library.

        Args:
            chain: Chain of this architecture, with the weights to write.
            tokens: Special tokens of the tokenizer.

        Returns:
            None if no class computes the same as the architecture.

        Raises:
            ModelError: There is such a class, but it does not compute the same as the architecture as configured.
        """
        return None

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        if self.sizes != "fixed" and not getattr(self.inputs, self.sizes):
            yield Misfit(("sizes",), repr(self.sizes), f"'fixed' with architecture {self.kind!r}", "set it to 'fixed'")

    def token_misfits(self, tokens: SpecialTokens) -> Iterator[Misfit]:
        """Special tokens with which the architecture would read texts wrongly; paths are those of a plan.

        By default padding is told by its token, so that it may not be the end.
        """
        if tokens.pad == tokens.sep:
            got = f"a tokenizer whose padding is its end token, id {tokens.pad}"
            allowed = f"padding of its own with architecture {self.kind!r}, which would not read the end"
            yield Misfit(("tokenizer",), got, allowed, "give it a pad token of its own, or use another tokenizer")

    def written_by(self) -> Sequence[Transformer]:
        """The stacks that generate word by word, so that they may not look at later words."""
        return [stack for name, stack in self.stacks.items() if name == "generation"]

    @property
    def fillings(self) -> Mapping[str, FeedForwardConfig]:
        """The fillings of the feed-forward slots, by stack."""
        return {name: stack.ffn for name, stack in self.stacks.items()}

    @property
    def kinds_of_filling(self) -> str:
        """Their kinds, for messages."""
        return " and ".join(dict.fromkeys(repr(ffn.kind) for ffn in self.fillings.values()))

    @property
    def sparse(self) -> Mapping[str, LIMoEConfig | MoMELIMoEConfig]:
        """The fillings whose experts a router chooses."""
        return {name: ffn for name, ffn in self.fillings.items() if isinstance(ffn, LIMoEConfig | MoMELIMoEConfig)}

    @property
    def has_routers(self) -> bool:
        """Whether a block that encodes pictures or texts has a router that looks at tokens."""
        encoders = [stack for name, stack in self.stacks.items() if name not in ("alignment", "generation")]
        return any(is_routed(one.ffn, block, one.layers) for one in encoders for block in range(one.layers))

    @property
    def recomputed(self) -> tuple[Recompute, ...]:
        """Recomputation of the stacks: one mode if all have the same."""
        return tuple(dict.fromkeys(stack.recompute for stack in self.stacks.values()))

    def recomputing(self, mode: Recompute) -> Self:
        """The same with one mode of recomputation for all stacks."""
        same = _with_stacks(self, lambda stack: replace(stack, recompute=mode))
        names = {entry.name for entry in dataclasses.fields(self)}
        changed: dict[str, Any] = {"recompute": mode} if "recompute" in names else {}
        return replace(same, **changed)

    def portable(self) -> Self:
        """The same for machines on which an optional package is not installed."""
        return self.refilled(for_any_machine)

    def refilled(self, change: Callable[[FeedForwardConfig], FeedForwardConfig]) -> Self:
        """The same with the filling of each feed-forward slot changed."""
        same = _with_stacks(self, lambda stack: replace(stack, ffn=change(stack.ffn)))
        ffn: FeedForwardConfig | None = getattr(self, "ffn", None)
        changed: dict[str, Any] = {} if ffn is None else {"ffn": change(ffn)}
        return replace(same, **changed)


def _with_stacks(part: _Part, change: Callable[[Transformer], Transformer]) -> _Part:
    """An architecture, or a part of it, with each stack changed that lies in it or in its parts."""
    assert dataclasses.is_dataclass(part)
    changed: dict[str, Any] = {}
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if isinstance(value, Transformer):
            changed[entry.name] = change(value)
        elif dataclasses.is_dataclass(value):
            changed[entry.name] = _with_stacks(value, change)
    return cast("_Part", replace(cast("Any", part), **changed))


def widths_of(stacks: Mapping[str, Transformer]) -> dict[str, object]:
    """Sizes that stacks must share with weights of an earlier stage, by path; stacks by their fields."""
    sizes = ("hidden_size", "num_heads", "mlp_ratio")
    return {f"{name}.{size}": getattr(stack, size) for name, stack in stacks.items() for size in sizes}


def check(architecture: Architecture) -> None:
    """Refuses a configuration that does not fit together, all misfits at once.

    Raises:
        ModelError: One line per misfit.
    """
    found = list(architecture.misfits())
    if found:
        raise ModelError("\n".join(f"model.{one}" for one in found))


def streams_needed(objective: Objective) -> frozenset[str]:
    """The streams that an objective reads, on any kind of batch."""
    return frozenset[str]().union(*(demands.streams for demands in objective.demands_of_kinds.values()))


def missing_streams(architecture: Architecture, objective: Objective) -> list[str]:
    """The streams that an objective reads and the architecture lacks, by name."""
    return sorted(streams_needed(objective) - set(architecture.offers))
