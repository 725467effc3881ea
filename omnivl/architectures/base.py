"""What an architecture is: a frozen configuration that builds its own layers.

A new architecture is one file with one such class, one entry in the union in ``omnivl.architectures`` and one plan.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

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

Layers = Iterator[tuple[str, ChainLayer]]
"""Layers with their names, in the order in which they are built and, but for ``Architecture.order``, passed."""


@dataclass(frozen=True)
class Kit:
    """What a build hands to an architecture besides its own sizes.

    Attributes:
        objectives: The stage's objectives.
        tokens: Special tokens of the tokenizer.
        gather: How to see the other replicas.
        compute_dtype: fp32 or bf16: the dtype of activations between the first layer and the losses.
        momentum: Of the twins; None where no objective reads any, or where the architecture has none.
    """

    objectives: tuple[Objective, ...]
    tokens: SpecialTokens
    gather: Gather
    compute_dtype: torch.dtype
    momentum: MomentumConfig | None

    @property
    def writes_from_texts(self) -> bool:
        """Whether what is written looks at fused rows, so that its decoder reads their width and not the pictures'."""
        asked = (demands for objective in self.objectives for demands in objective.demands_of_kinds.values())
        return any(demands.writes_from_fused for demands in asked)

    def momentum_of(self, stream: str) -> MomentumConfig | None:
        """Of the twins of one stream's blocks; None where no objective reads what these make."""
        return self.momentum if any(stream in objective.twins for objective in self.objectives) else None


@dataclass(frozen=True)
class Architecture(ABC):
    """Base of all architectures: frozen dataclasses; ``kind: Literal[...]`` tells them apart in a plan.

    Attributes:
        kind: Tells it apart from the others.
        momentum: Momentum twins; None builds none.

    Of the class: ``streams``, the streams that the chain can have (see ``omnivl.chain.demands``); ``shows``, what
    samples may show; ``presets``, named configurations, which a plan's ``model.preset`` may name; ``vocabulary``, where
    in the configuration the size of the plan's tokenizer stands; ``readers``, sections of stacks that may have a
    tokenizer of their own, each with fields ``tokenizer`` and ``vocab_size``; ``starts_from``, stacks whose blocks
    start as copies of another stack's, where an earlier stage has none of theirs.
    """

    streams: ClassVar[tuple[str, ...]]
    shows: ClassVar[tuple[Visual, ...]] = VISUALS
    presets: ClassVar[Mapping[str, Any]] = {}
    vocabulary: ClassVar[tuple[str, ...]] = ("vocab_size",)
    readers: ClassVar[tuple[tuple[str, ...], ...]] = ()
    starts_from: ClassVar[Mapping[str, str]] = {}

    kind: str = ""
    momentum: MomentumConfig | None = None

    @property
    @abstractmethod
    def inputs(self) -> InputSizes:
        """What the data side needs to know of the sizes."""

    @property
    @abstractmethod
    def heads(self) -> HeadSizes:
        """What heads are built from."""

    @property
    @abstractmethod
    def stacks(self) -> Mapping[str, Transformer]:
        """The stacks of blocks, by the beginning of their layers' names."""

    @property
    def offers(self) -> tuple[str, ...]:
        """The streams that the chain has as it is configured: none writes where the stack that would has no blocks."""
        writing = self.written_by()
        silent = bool(writing) and not any(stack.layers for stack in writing)
        return tuple(stream for stream in self.streams if not (silent and stream.endswith("generation")))

    @property
    def text_inputs(self) -> Mapping[str, TextInput]:
        """How stacks read texts that do not read the batch's ``token_ids``, by stack."""
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
        """Names of the layers in the order of the forward pass, in which one may stand twice."""
        return names

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of another library under this architecture's names, those of heads included.

        Args:
            weights: As the folder holds them.
            path: The folder, for messages.

        Returns:
            None where the weights are of no family that the architecture knows.

        Raises:
            ModelError: They are of a known family, but the architecture, as it is configured, computes something else.
        """
        return None

    def to_foreign(self, chain: Chain, tokens: SpecialTokens) -> Foreign | None:
        """The model as a class of another library has it.

        Args:
            chain: Of this architecture, with the weights to write.
            tokens: Special tokens of the tokenizer.

        Returns:
            None where no class computes what the architecture does.

        Raises:
            ModelError: There is such a class, but it does not compute what the architecture does as it is configured.
        """
        return None

    def misfits(self) -> Iterator[Misfit]:
        """What does not fit together."""
        return iter(())

    def written_by(self) -> Sequence[Transformer]:
        """The stacks that write word by word, hence may not look at words to come."""
        return [stack for name, stack in self.stacks.items() if name == "generation"]

    @property
    def fillings(self) -> Mapping[str, FeedForwardConfig]:
        """What fills the feed-forward slots, by stack."""
        return {name: stack.ffn for name, stack in self.stacks.items()}

    @property
    def kinds_of_filling(self) -> str:
        """Their kinds, for messages."""
        return " and ".join(dict.fromkeys(repr(ffn.kind) for ffn in self.fillings.values()))

    @property
    def sparse(self) -> Mapping[str, LIMoEConfig | MoMELIMoEConfig]:
        """Those of the fillings whose experts a router chooses."""
        return {name: ffn for name, ffn in self.fillings.items() if isinstance(ffn, LIMoEConfig | MoMELIMoEConfig)}

    @property
    def has_routers(self) -> bool:
        """Whether a block that encodes pictures or texts has a router that looks at tokens."""
        encoders = [stack for name, stack in self.stacks.items() if name not in ("alignment", "generation")]
        return any(is_routed(one.ffn, block, one.layers) for one in encoders for block in range(one.layers))

    @property
    def recomputed(self) -> tuple[Recompute, ...]:
        """What the stacks' backward passes compute anew: one word where all do alike."""
        return tuple(dict.fromkeys(stack.recompute for stack in self.stacks.values()))

    def recomputing(self, mode: Recompute) -> Self:
        """The same with all stacks recomputing alike."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        changed: dict[str, Any] = {
            name: replace(value, recompute=mode) for name, value in fields.items() if isinstance(value, Transformer)
        }
        if "recompute" in fields:
            changed["recompute"] = mode
        return replace(self, **changed)

    def portable(self) -> Self:
        """The same for machines on which an optional package is not installed."""
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        changed: dict[str, Any] = {}
        for name, value in fields.items():
            if isinstance(value, Transformer):
                changed[name] = replace(value, ffn=for_any_machine(value.ffn))
            elif name == "ffn":
                changed[name] = for_any_machine(value)
        return replace(self, **changed)


def widths_of(stacks: Mapping[str, Transformer]) -> dict[str, object]:
    """Sizes of stacks that weights of an earlier stage must share, by path; stacks by the field that gives them."""
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
