"""Builds the chain from its configuration."""

from collections.abc import Callable, Sequence

import torch

from moe.experts.megablocks import REMEDY, import_problem
from omnivl.architectures.base import Architecture, Kit, check, missing_streams, streams_needed
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Objective
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.parts.block import BlockLayer
from omnivl.parts.decoder import looking_ahead

Settle = Callable[[str, ChainLayer], None]
"""Called with each layer and its name as soon as its starting values are drawn, before the next layer is made."""


def build_chain(
    architecture: Architecture,
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
        architecture: The layers and their sizes.
        objectives: The stage's objectives.
        tokens: Special tokens of the tokenizer.
        gather: How to see the other replicas; None for a single one.
        compute_dtype: fp32 or bf16: the dtype of activations between ``Embed`` and the losses.
        settle: Called with each layer once it is built: loads other values into it, or shards it. If it shards every
            layer, no process holds more than one whole layer. It must not draw from torch's generator.

    Raises:
        ModelError: The configuration does not fit together or asks for a package that is not there, the vocabulary
            is too small for the tokenizer, or the architecture would read its texts wrongly.
    """
    check(architecture)
    if misread := [str(one) for one in architecture.token_misfits(tokens)]:
        raise ModelError("\n".join(misread))
    _check_objectives(architecture, objectives)
    vocabulary = architecture.heads.vocab_size
    if any(ffn.implementation == "megablocks" for ffn in architecture.sparse.values()):
        reason = import_problem()
        if reason is not None:
            raise ModelError(
                f"model.ffn.implementation: got 'megablocks', which does not import here ({reason}); allowed 'auto', "
                f"'loop', 'grouped', 'batched'; {REMEDY}, or set it to 'auto'"
            )
    if tokens.vocab_size > vocabulary:
        raise ModelError(
            f"model.{'.'.join(architecture.vocabulary)}: {vocabulary} rows for a tokenizer of {tokens.vocab_size} "
            f"words; set it to {tokens.vocab_size} or more"
        )
    gather = LocalGather() if gather is None else gather
    momentum = architecture.momentum if any(objective.twins for objective in objectives) else None
    kit = Kit(tuple(objectives), tokens, gather, compute_dtype, momentum)
    layers: dict[str, ChainLayer] = {}
    for name, layer in architecture.layers(kit):
        if isinstance(layer, BlockLayer):
            layer.gather = gather
        if settle is not None:
            settle(name, layer)
        layers[name] = layer
    return Chain(layers, architecture.order(list(layers)), objectives)


def _check_objectives(architecture: Architecture, objectives: Sequence[Objective]) -> None:
    """Refuses objectives that the architecture cannot serve.

    Raises:
        ModelError: A stream is missing, or a stack that generates would look at later words.
    """
    for objective in objectives:
        if lacking := missing_streams(architecture, objective):
            raise ModelError(
                f"objective {objective.key!r} asks for the stream {lacking[0]!r}; architecture {architecture.kind!r} "
                f"has {', '.join(architecture.offers)}; take the objective out or change model.kind"
            )
    kinds = [kind for stack in architecture.written_by() if (kind := looking_ahead(stack)) is not None]
    if kinds and any("generation" in streams_needed(objective) for objective in objectives):
        raise ModelError(
            f"model.ffn.router.kind: got {kinds[0]!r} with an objective that writes; allowed 'token_choice', or "
            "another router that does not look at the words to come; take the objective out or change the router"
        )


def outline(architecture: Architecture, objectives: Sequence[Objective] = ()) -> Chain:
    """A chain without storage, to ask for its layers, their order, their properties and the names of its parameters.

    Args:
        architecture: Its tokenizer need not be known.
        objectives: Those whose heads and twins it is to have.

    Raises:
        ModelError: See ``build_chain``.
    """
    tokens = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=0, num_reserved=0)
    with torch.device("meta"):
        return build_chain(architecture, objectives, tokens)
