"""Which streams an architecture has, how wide they are, and which of them an objective needs."""

from omnivl.chain.objective import Objective
from omnivl.chain.sizes import HeadSizes
from omnivl.data.batch import DATA_KINDS
from omnivl.parts.config import ModelConfig


def streams_of(config: ModelConfig) -> tuple[str, ...]:
    """The streams that the architecture has; see ``omnivl.chain.demands``."""
    last = "fused_visual" if config.architecture == "unified" else "generation"
    return ("visual", "text", "embedding", "fused", last)


def streams_needed(objective: Objective) -> frozenset[str]:
    """The streams that an objective reads, on any kind of batch."""
    asked = (objective.demands(kind, 2**20) for kind in DATA_KINDS)
    return frozenset[str]().union(*(demands.streams for demands in asked if demands is not None))


def missing_streams(config: ModelConfig, objective: Objective) -> list[str]:
    """The streams that an objective reads and the architecture lacks, by name."""
    return sorted(streams_needed(objective) - set(streams_of(config)))


def head_sizes(config: ModelConfig) -> HeadSizes:
    """What heads are built from."""
    return HeadSizes(
        widths=dict.fromkeys(streams_of(config), config.hidden_size),
        vocab_size=config.vocab_size,
        projection_size=config.projection_size,
        patch_size=config.patch_size,
        tubelet_size=config.tubelet_size,
    )
