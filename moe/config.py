"""Configurations of the fillings of a block's feed-forward slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from moe.experts.products import Implementation
from moe.ranges import Range
from moe.routers import AnyRouterConfig, TokenChoice
from moe.routers.base import require

Activation = Literal["gelu", "quick_gelu", "relu"]
"""The activation of a dense perceptron: GELU by the error function, x * sigmoid(1.702 x), or ReLU."""


@dataclass(frozen=True)
class DenseConfig:
    """An ordinary two-layer perceptron, the same for every token."""

    kind: Literal["dense"] = "dense"


@dataclass(frozen=True)
class MoMEConfig:
    """A perceptron for each modality.

    Attributes:
        shared: Modalities that share one, by its name, e.g. ``{vision: [image, video]}``. The others have their own.
        fusion_from: From this block of a stack on (counted from 0), tokens of sequences that join modalities go to a
            separate perceptron, ``fusion``; null: in all blocks to that of their modality.

    Source: Bao et al., VLMo, arXiv 2111.02358, section 3.2; Wang et al., BEiT-3, arXiv 2208.10442, section 2.1.
    """

    kind: Literal["mome"] = "mome"
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fusion_from: Annotated[int, Range(0)] | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: A modality stands in two groups.
        """
        named = [name for group in self.shared.values() for name in group]
        double = sorted({name for name in named if named.count(name) > 1})
        require(not double, f"ffn.shared: got {', '.join(double)} in more than one group, allowed is one")


@dataclass(frozen=True)
class SparseConfig:
    """Options of all sparse fillings: a router sends each token to a few of many experts.

    Attributes:
        router: Which experts a token goes to.
        every: Every n-th block of a stack, from block n - 1 on, has experts; the others are dense. 1: all have.
        blocks: The blocks of a stack that have experts, counted from 0 up or from the top as -1, -2; null: by
            ``every``.
        expert_ratio: Inner size of an expert over that of the dense layer.
        shared_experts: Experts of the same size that see every token and need no router.
        upcycle_noise: If experts start as copies of the dense layer of an earlier stage: deviation of the noise that is
            added to each copy's matrices, over the deviation of their entries. At 0 the layer at first equals the dense
            one (with the router's ``renormalise``).
        implementation: How the experts' products are computed: ``auto`` takes ``batched`` on a CPU and ``grouped`` on a
            GPU, ``loop`` is the reference, ``megablocks`` the kernel of that package (bf16 on a GPU; has to be
            installed).

    Source: Riquelme et al., V-MoE, arXiv 2106.05974; Mustafa et al., LIMoE, arXiv 2206.02770. Experts that see all
        tokens: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.2.
    """

    router: AnyRouterConfig = field(default_factory=TokenChoice)
    every: Annotated[int, Range(1)] = 2
    blocks: tuple[int, ...] | None = None
    expert_ratio: Annotated[float, Range(above=0)] = 1.0
    shared_experts: Annotated[int, Range(0)] = 0
    upcycle_noise: Annotated[float, Range(0)] = 0.0
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: One contradicts another.
        """
        _check_places(self.every, self.blocks)


@dataclass(frozen=True)
class LIMoEConfig(SparseConfig):
    """Sparse experts for the tokens of all modalities together.

    Attributes:
        num_experts: Experts of a block.
    """

    kind: Literal["limoe"] = "limoe"
    num_experts: Annotated[int, Range(1)] = 8

    def __post_init__(self) -> None:
        """See ``SparseConfig``."""
        super().__post_init__()
        wanted = f"{self.router.experts_per_token:g}"
        require(
            self.num_experts >= self.router.experts_per_token,
            f"ffn.num_experts: got {self.num_experts} with {wanted} experts per token, allowed is {wanted} or more",
        )

    def allowed_experts(self, modalities: Sequence[str]) -> list[list[bool]] | None:
        """Which experts each modality may go to, ``[M][E]``; None: all may go to all."""
        return None


@dataclass(frozen=True)
class MoMELIMoEConfig(SparseConfig):
    """Sparse experts in one pool for each modality and a common pool for all.

    A token is routed among the experts of its modality's pool and the common ones. Nearest precedent: Shen et al.,
    VL-MoE, arXiv 2303.07226, section 3.

    Attributes:
        pools: Experts that serve one modality only, by its name; a modality that is not named has only the common ones.
        common_experts: Experts that serve all.
    """

    kind: Literal["mome_limoe"] = "mome_limoe"
    pools: Mapping[str, Annotated[int, Range(1)]] = field(default_factory=lambda: {"image": 4, "video": 4, "text": 4})
    common_experts: Annotated[int, Range(0)] = 4

    @property
    def num_experts(self) -> int:
        """Experts of a block: the pools in their order, then the common ones."""
        return sum(self.pools.values()) + self.common_experts

    def __post_init__(self) -> None:
        """See ``SparseConfig``."""
        super().__post_init__()
        for name, size in self.pools.items():
            fewest = self.router.fewest_experts
            require(
                size + self.common_experts >= fewest,
                f"ffn.pools: got {size} experts for {name} and {self.common_experts} common ones, allowed is "
                f"{fewest} or more in all, as many as a token needs",
            )

    def allowed_experts(self, modalities: Sequence[str]) -> list[list[bool]] | None:
        """Which experts each modality may go to, ``[M][E]``."""
        owners = [name for name, size in self.pools.items() for _ in range(size)] + [None] * self.common_experts
        return [[owner is None or owner == modality for owner in owners] for modality in modalities]


@dataclass(frozen=True)
class AttributeConfig:
    """Experts that are chosen by the kind of a token, the same for all tokens of a kind.

    Attributes:
        num_experts: Experts of a block.
        top_k: Experts per kind; each has the dense layer's inner size.
        every: Every n-th block of a stack, from block n - 1 on, has experts; the others are dense. 1: all have.
        blocks: The blocks of a stack that have experts, counted from 0 up or from the top as -1, -2; null: by
            ``every``.
        attention: Whether the attention projections of these blocks have as many experts, with separate gates; in the
            unified transformer only.
        noise: Deviation of the gate's noise in training, in units of 1 / number of experts.
        num_attributes: Bits that describe a kind.
        attribute_size: Width in which bits are embedded.

    Source: Zhu et al., Uni-Perceiver-MoE, arXiv 2206.04674, section 3.2.
    """

    kind: Literal["attribute"] = "attribute"
    num_experts: Annotated[int, Range(1)] = 8
    top_k: Annotated[int, Range(1)] = 2
    every: Annotated[int, Range(1)] = 2
    blocks: tuple[int, ...] | None = None
    attention: bool = False
    noise: Annotated[float, Range(0)] = 1.0
    num_attributes: Annotated[int, Range(1)] = 8
    attribute_size: Annotated[int, Range(1)] = 64

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: One contradicts another.
        """
        _check_places(self.every, self.blocks)
        allowed = f"1 to num_experts {self.num_experts}"
        require(self.top_k <= self.num_experts, f"ffn.top_k: got {self.top_k}, allowed is {allowed}")


FeedForwardConfig = Annotated[
    DenseConfig | MoMEConfig | LIMoEConfig | MoMELIMoEConfig | AttributeConfig, Field(discriminator="kind")
]
"""Union of everything that can fill the slot, discriminated by ``kind``."""


def without_noise(config: FeedForwardConfig) -> FeedForwardConfig:
    """The same filling with a router or gate that draws no noise, for momentum twins."""
    if isinstance(config, SparseConfig):
        return replace(config, router=config.router.without_noise())
    return replace(config, noise=0.0) if isinstance(config, AttributeConfig) else config


def for_any_machine(config: FeedForwardConfig) -> FeedForwardConfig:
    """The same filling with ``implementation: auto``, for a machine other than the one it was trained on."""
    return replace(config, implementation="auto") if isinstance(config, SparseConfig) else config


def named_modalities(config: FeedForwardConfig) -> dict[str, tuple[str, ...]]:
    """The modalities that a configuration names, by the field that names them."""
    found: dict[str, tuple[str, ...]] = {}
    if isinstance(config, MoMEConfig):
        found |= {f"shared.{group}": names for group, names in config.shared.items()}
    if isinstance(config, MoMELIMoEConfig):
        found["pools"] = tuple(config.pools)
    if isinstance(config, SparseConfig):
        losses = config.router.losses
        by_modality = {
            "local_entropy": losses.local_entropy,
            "global_entropy": losses.global_entropy,
            "min_experts": losses.min_experts,
        }
        found |= {f"router.losses.{name}": tuple(weights) for name, weights in by_modality.items()}
    return found


def _check_places(every: int, blocks: tuple[int, ...] | None) -> None:
    """Refuses ``every`` and ``blocks`` that contradict each other; whether the blocks exist depends on the stack."""
    if blocks is not None:
        require(len(blocks) > 0, "ffn.blocks: got no block, allowed is null or one block or more")
        require(len(set(blocks)) == len(blocks), f"ffn.blocks: got {list(blocks)}, allowed is each block once")
        allowed = "allowed is one of the two: leave every out where blocks are named"
        require(every == SparseConfig.every, f"ffn.every: got {every} beside blocks {list(blocks)}, {allowed}")
