"""What can fill a block's feed-forward slot, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from moe.experts.products import Implementation
from moe.ranges import Range
from moe.routers.losses import RouterLossConfig

Activation = Literal["gelu", "quick_gelu"]
"""What stands between the two maps of a dense perceptron: GELU by the error function, or x * sigmoid(1.702 x)."""


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
            perceptron of their own, ``fusion``; null: everywhere to that of their modality.

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
        _require(not double, f"ffn.shared: got {', '.join(double)} in more than one group, allowed is one")


@dataclass(frozen=True)
class SparseConfig:
    """What all sparse fillings share: a router that sends each token to a few of many experts.

    Attributes:
        routing: ``token_choice``: each token takes its best experts. ``expert_choice``: each expert takes its best
            tokens, equally many, so that no loss has to balance them. A token then gets none, one or several, and what
            it gets depends on the other tokens of its batch: not for text that is written word by word (``lm``).
        top_k: Experts per token; under ``expert_choice`` their mean number.
        every: Every so-manieth block of a stack has experts, the last one of each group; the others are dense.
        blocks: The blocks of a stack that have experts, from 0 up or from the top as -1, -2; null: as ``every`` says.
        expert_ratio: Inner size of an expert over that of the dense layer.
        shared_experts: Experts of the same size that see every token and need no router.
        noise: Deviation of the router's noise in training, in units of 1 / number of experts.
        renormalise: Divide a token's weights by their sum. Experts that are copies of a dense layer then give exactly
            what it gives, which upcycling wants.
        capacity_factor: Most tokens an expert serves, over what it would serve if all served alike; null: any number.
            Under ``expert_choice`` each serves as many, and null is 1.
        priority: Under a capacity, serve the tokens first of which the router is surest, instead of the earlier ones.
        selection_bias_rate: Step of a bias that balances the experts without a loss; 0 for none.
        losses: Auxiliary losses.
        upcycle_noise: Where experts start as copies of the dense layer of an earlier stage: deviation of the noise that
            is added to each copy's matrices, over the deviation of their entries. At 0 the layer gives at first what
            the dense one gave (with ``renormalise``).
        implementation: How the experts' products are computed: ``auto`` takes ``batched`` on a CPU and ``grouped`` on a
            GPU, ``loop`` is the reference, ``megablocks`` that package's kernel (bf16 on a GPU, to be installed).

    Source: Riquelme et al., V-MoE, arXiv 2106.05974; Mustafa et al., LIMoE, arXiv 2206.02770. Experts that see all
        tokens: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.2. Expert choice: Zhou et al., arXiv 2202.09368.
    """

    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    top_k: Annotated[int, Range(1)] = 1
    every: Annotated[int, Range(1)] = 2
    blocks: tuple[int, ...] | None = None
    expert_ratio: Annotated[float, Range(above=0)] = 1.0
    shared_experts: Annotated[int, Range(0)] = 0
    noise: Annotated[float, Range(0)] = 1.0
    renormalise: bool = False
    capacity_factor: Annotated[float, Range(above=0)] | None = None
    priority: bool = True
    selection_bias_rate: Annotated[float, Range(0)] = 0.0
    losses: RouterLossConfig = field(default_factory=RouterLossConfig)
    upcycle_noise: Annotated[float, Range(0)] = 0.0
    implementation: Implementation = "auto"

    @property
    def experts_per_token(self) -> float:
        """Experts that a token goes to; where experts choose, the mean number, as far as they find tokens enough."""
        factor = self.capacity_factor if self.routing == "expert_choice" else None
        return self.top_k * (1.0 if factor is None else factor)

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: One contradicts another.
        """
        _check_places(self.every, self.blocks)
        if self.routing == "expert_choice":
            self._check_expert_choice()
        _require(
            not (self.losses.load > 0 and self.noise == 0),
            f"ffn.losses: got load {self.losses.load} with noise 0, allowed is load 0, or noise above 0: the load loss "
            "is made of the noise",
        )

    def _check_expert_choice(self) -> None:
        """Refuses what only means something where tokens choose."""
        chosen = "with routing expert_choice"
        _require(self.noise == 0, f"ffn.noise: got {self.noise} {chosen}, allowed is 0: experts rank without noise")
        _require(
            not self.renormalise,
            f"ffn.renormalise: got true {chosen}, allowed is false: a token's weights need not stand for all of it",
        )
        _require(
            self.selection_bias_rate == 0,
            f"ffn.selection_bias_rate: got {self.selection_bias_rate} {chosen}, allowed is 0: all experts serve alike",
        )
        _require(
            self.losses.load == 0,
            f"ffn.losses: got load {self.losses.load} {chosen}, allowed is load 0: the load loss is made of the noise "
            "of tokens that choose",
        )


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
        got = f"got top_k {self.top_k} of {self.num_experts}"
        _require(self.num_experts >= self.top_k, f"ffn.num_experts: {got}, allowed is top_k or more")


@dataclass(frozen=True)
class MoMELIMoEConfig(SparseConfig):
    """Sparse experts of which each modality has a pool of its own, beside a pool for all.

    A token is routed among the experts of its own pool and the common ones. Nearest precedent: Shen et al., VL-MoE,
    arXiv 2303.07226, section 3.

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
            available = size + self.common_experts
            _require(
                available >= self.top_k,
                f"ffn.pools: got {size} experts for {name} and {self.common_experts} common ones, allowed is "
                f"top_k {self.top_k} or more in all",
            )


@dataclass(frozen=True)
class AttributeConfig:
    """Experts that are chosen by the kind of a token, the same for all tokens of a kind.

    Attributes:
        num_experts: Experts of a block.
        top_k: Experts per kind; each has the dense layer's inner size.
        every: Every so-manieth block of a stack has experts, the last one of each group; the others are dense.
        blocks: The blocks of a stack that have experts, from 0 up or from the top as -1, -2; null: as ``every`` says.
        attention: Whether the attention projections of these blocks have as many experts, by gates of their own; in the
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
        _require(self.top_k <= self.num_experts, f"ffn.top_k: got {self.top_k}, allowed is {allowed}")


FeedForwardConfig = Annotated[
    DenseConfig | MoMEConfig | LIMoEConfig | MoMELIMoEConfig | AttributeConfig, Field(discriminator="kind")
]
"""Union of everything that can fill the slot, discriminated by ``kind``."""


def without_noise(config: FeedForwardConfig) -> FeedForwardConfig:
    """The same filling with a router that draws nothing, for modules that only follow."""
    if isinstance(config, SparseConfig):
        return replace(config, noise=0.0, losses=replace(config.losses, load=0.0))
    return replace(config, noise=0.0) if isinstance(config, AttributeConfig) else config


def for_any_machine(config: FeedForwardConfig) -> FeedForwardConfig:
    """The same filling, its products computed as the machine at hand does it best: for weights from elsewhere."""
    return replace(config, implementation="auto") if isinstance(config, SparseConfig) else config


def named_modalities(config: FeedForwardConfig) -> dict[str, tuple[str, ...]]:
    """The modalities that a configuration names, by the field that names them."""
    found: dict[str, tuple[str, ...]] = {}
    if isinstance(config, MoMEConfig):
        found |= {f"shared.{group}": names for group, names in config.shared.items()}
    if isinstance(config, MoMELIMoEConfig):
        found["pools"] = tuple(config.pools)
    if isinstance(config, SparseConfig):
        losses = config.losses
        by_modality = {
            "local_entropy": losses.local_entropy,
            "global_entropy": losses.global_entropy,
            "min_experts": losses.min_experts,
        }
        found |= {f"losses.{name}": tuple(weights) for name, weights in by_modality.items()}
    return found


def _check_places(every: int, blocks: tuple[int, ...] | None) -> None:
    """Refuses places of experts that contradict each other; whether the blocks exist is known with the stack."""
    if blocks is not None:
        _require(len(blocks) > 0, "ffn.blocks: got no block, allowed is null or one block or more")
        _require(len(set(blocks)) == len(blocks), f"ffn.blocks: got {list(blocks)}, allowed is each block once")
        allowed = "allowed is one of the two: leave every out where blocks are named"
        _require(every == SparseConfig.every, f"ffn.every: got {every} beside blocks {list(blocks)}, {allowed}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
