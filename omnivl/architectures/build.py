"""Builds the chain from its configuration."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from moe.config import SparseConfig
from moe.experts.megablocks import REMEDY, import_problem
from moe.feed_forward import is_routed
from omnivl.architectures.presets import check_config
from omnivl.architectures.streams import head_sizes, missing_streams, streams_needed, streams_of
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Objective
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.parts.bert import TextBlock
from omnivl.parts.block import BlockLayer
from omnivl.parts.config import ModelConfig
from omnivl.parts.decoder import AlignmentBlock, GenerationBlock, looking_ahead
from omnivl.parts.embed import Embed
from omnivl.parts.join import JoinRows
from omnivl.parts.losses import Losses
from omnivl.parts.project import Project
from omnivl.parts.unified import UnifiedLayer, UnifiedNorm
from omnivl.parts.vit import VisualBlock, VisualNorm

Settle = Callable[[str, ChainLayer], None]
"""Called with each layer and its name as soon as its starting values are drawn, before the next layer is made."""


def build_chain(
    config: ModelConfig,
    objectives: Sequence[Objective],
    tokens: SpecialTokens,
    *,
    gather: Gather | None = None,
    compute_dtype: torch.dtype = torch.float32,
    settle: Settle | None = None,
) -> Chain:
    """Builds all layers one after the other, with fp32 parameters drawn from torch's generator.

    Every stack is built whether or not this stage's objectives use it, so that weights pass untouched through a stage
    that does not. Heads and momentum twins follow the objectives.

    Args:
        config: Sizes.
        objectives: The stage's objectives.
        tokens: Special tokens of the tokenizer.
        gather: How to see the other replicas; None for a single one.
        compute_dtype: fp32 or bf16: the dtype of activations between ``Embed`` and the losses.
        settle: Fills a layer with other values, or leaves a share of it here: whoever keeps less than a layer of each
            never holds more than one. It draws nothing from torch's generator.

    Raises:
        ModelError: The configuration does not fit together or asks for a package that is not there, or the vocabulary
            is too small for the tokenizer.
    """
    check_config(config)
    for objective in objectives:
        lacking = missing_streams(config, objective)
        if lacking:
            raise ModelError(
                f"objective {objective.key!r} asks for the stream {lacking[0]!r}; architecture {config.architecture!r} "
                f"has {', '.join(streams_of(config))}; take the objective out or change model.architecture"
            )
    kind = looking_ahead(config)
    if kind is not None and any("generation" in streams_needed(objective) for objective in objectives):
        raise ModelError(
            f"model.ffn.router.kind: got {kind!r} with an objective that writes; allowed 'token_choice', or another "
            "router that does not look at the words to come; take the objective out or change the router"
        )
    if isinstance(config.ffn, SparseConfig) and config.ffn.implementation == "megablocks":
        reason = import_problem()
        if reason is not None:
            raise ModelError(
                f"model.ffn.implementation: got 'megablocks', which does not import here ({reason}); allowed 'auto', "
                f"'loop', 'grouped', 'batched'; {REMEDY}, or set it to 'auto'"
            )
    if tokens.vocab_size > config.vocab_size:
        raise ModelError(
            f"model.vocab_size: {config.vocab_size} rows for a tokenizer of {tokens.vocab_size} words; "
            f"set it to {tokens.vocab_size} or more"
        )
    gather = LocalGather() if gather is None else gather
    twin = wants_momentum(config, objectives)
    layers: dict[str, ChainLayer] = {}

    def add(name: str, layer: ChainLayer) -> None:
        if isinstance(layer, BlockLayer):
            layer.gather = gather
        if settle is not None:
            settle(name, layer)
        layers[name] = layer

    unified = config.architecture == "unified"
    add("embed", Embed(config, tokens.pad, compute_dtype, twin=twin, joins_inputs=unified))
    stacks = _unified if unified else _towers
    for name, layer in stacks(config, objectives, gather, twin):
        add(name, layer)
    return Chain(layers, _twice(layers) if unified else None, objectives)


def _towers(
    config: ModelConfig, objectives: Sequence[Objective], gather: Gather, twin: bool
) -> Iterator[tuple[str, ChainLayer]]:
    for index in range(config.vision_layers):
        yield f"visual_{index:02d}", VisualBlock(index, config, twin=twin)
    yield "visual_norm", VisualNorm(config, twin=twin)
    for index in range(config.text_layers):
        yield f"text_{index:02d}", TextBlock(index, config, twin=twin)
    yield "contrast", Project(config, objectives)
    yield "join", JoinRows(objectives, gather)
    for index in range(config.alignment_layers):
        yield f"alignment_{index:02d}", AlignmentBlock(index, config)
    for index in range(config.generation_layers):
        yield f"generation_{index:02d}", GenerationBlock(index, config)
    yield "losses", Losses(config, head_sizes(config), objectives, gather)


def _unified(
    config: ModelConfig, objectives: Sequence[Objective], gather: Gather, twin: bool
) -> Iterator[tuple[str, ChainLayer]]:
    for index in range(config.vision_layers):
        yield f"unified_{index:02d}", UnifiedLayer(index, config, twin=twin)
    yield "unified_norm", UnifiedNorm(config, twin=twin)
    yield "contrast", Project(config, objectives, joins_inputs=True)
    yield "join", JoinRows(objectives, gather, joins_inputs=True, concatenates=True)
    yield "losses", Losses(config, head_sizes(config), objectives, gather)


def _twice(layers: Iterable[str]) -> list[str]:
    """The order in which the layers of the unified transformer are passed."""
    blocks = [name for name in layers if name.startswith("unified_")]
    return ["embed", *blocks, "contrast", "join", *blocks, "losses"]


def outline(config: ModelConfig) -> Chain:
    """A chain without storage, heads and twins: what layers there are, in which order, and what they say.

    Raises:
        ModelError: See ``build_chain``.
    """
    with torch.device("meta"):
        return build_chain(
            config, (), SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=0, num_reserved=0)
        )


def has_routers(config: ModelConfig) -> bool:
    """Whether a layer that encodes pictures or texts has a router that looks at tokens."""
    depths = {config.vision_layers} | ({config.text_layers} if config.architecture == "towers" else set())
    return any(is_routed(config.ffn, block, depth) for depth in depths for block in range(depth))


def wants_momentum(config: ModelConfig, objectives: Sequence[Objective]) -> bool:
    """Whether momentum twins are to be built: the configuration allows them and an objective reads them."""
    if config.momentum is None:
        return False
    return any(objective.twins for objective in objectives)
