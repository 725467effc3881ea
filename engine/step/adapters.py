"""Low-rank adapters (LoRA): a stage trains them beside the maps of blocks, and its heads; all else is frozen.

Source: Hu et al., arXiv 2106.09685; ``docs/design/0013-adapters.md``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from engine.step.freeze import names_parameter
from engine.step.whole import whole_numel
from moe.linear import Adapter, Linear, Role
from moe.ranges import Range
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.demands import TWIN
from omnivl.chain.modules import HasMaps
from omnivl.chain.names import only_trains
from omnivl.chain.state import StepLayout
from omnivl.randomness import stable_hash


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the linear maps of blocks: y = W x + b + (alpha / rank) B A x. W and b are frozen.

    Adapters and heads of objectives are trained, nothing else. What ``freeze`` names gets no adapters either. Their
    parameters are called ``MAP.adapter.down`` (A) and ``MAP.adapter.up`` (B): ``lr_scales: {"*.adapter.up": 16}`` gives
    B a rate of its own. The stage hands on, exports and evaluates merged weights; only its checkpoints have adapters. A
    momentum twin has adapters of its own, which follow those of its module.

    Source: Hu et al., LoRA (arXiv 2106.09685).

    Attributes:
        rank: Rank of an adapter. Queries, keys and values have one each, although they lie in one weight.
        alpha: Over the rank, the factor of what an adapter adds.
        dropout: Probability with which an input of an adapter is dropped in training.
        on: What the maps are for: ``attention`` (queries, keys, values and output, of temporal attention as well),
            ``cross_attention``, ``feed_forward`` (dense layers, those of experts by modality and shared ones among
            them). Banks of experts, embeddings and projections have none.
    """

    rank: Annotated[int, Range(1)] = 8
    alpha: Annotated[float, Range(above=0)] = 16.0
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    on: tuple[Role, ...] = ("attention",)


def maps_of(layer: ChainLayer) -> dict[str, tuple[Role, Linear]]:
    """The maps of a layer and of its twins that may have an adapter, by their names within the layer."""
    names = {id(module): name for name, module in layer.named_modules()}
    owners = [module for module in layer.modules() if isinstance(module, HasMaps)]
    return {names[id(one)]: (role, one) for owner in owners for role, one in owner.maps()}


def adapt_layer(
    name: str,
    layer: ChainLayer,
    lora: LoraConfig,
    *,
    layouts: Sequence[StepLayout],
    frozen: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Gives the maps of a layer adapters, but for those that no step trains. Draws nothing from torch's generator.

    Args:
        name: The layer's name in the chain.
        layer: Whole and filled; not sharded yet.
        lora: Which maps, and sizes.
        layouts: Of all kinds of steps of the stage.
        frozen: The stage's patterns of what is not trained (``engine.step.freeze.freeze``).
        seed: Of starting values, together with the map's name. A twin starts equal to its module.
    """
    maps = {path: one for path, (role, one) in maps_of(layer).items() if role in lora.on}
    idle = {id(parameter) for parameter in layer.idle_parameters([layout.learnt for layout in layouts])}
    for path, one in maps.items():
        followed = _followed(path)
        own = f"{name}.{followed}"
        if id(maps[followed].weight) in idle or any(names_parameter(pattern, f"{own}.weight") for pattern in frozen):
            continue
        dropout = lora.dropout if path == followed else 0.0
        adapter = one.adapt(lora.rank, lora.alpha, dropout, stable_hash(seed, "adapter", own))
        adapter.requires_grad_(path == followed)


def train_adapters(chain: Chain) -> None:
    """Freezes all parameters but those of adapters and heads."""
    for layer in chain.layers:
        kept = {id(one) for module in layer.modules() if isinstance(module, Adapter) for one in module.parameters()}
        kept |= {id(one) for one in layer.head_parameters()}
        for parameter in layer.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)


def adapt(
    chain: Chain, lora: LoraConfig | None, *, layouts: Sequence[StepLayout], frozen: Sequence[str] = (), seed: int = 0
) -> None:
    """Gives a whole chain its adapters, and freezes all but them and heads; does nothing where there are none.

    Args:
        chain: Without adapters; also one without storage.
        lora: The stage's; None for none.
        layouts: See ``adapt_layer``, as the others.
        frozen: See there.
        seed: See there.
    """
    if lora is None:
        return
    for name, layer in chain.named_layers.items():
        adapt_layer(name, layer, lora, layouts=layouts, frozen=frozen, seed=seed)
    train_adapters(chain)


def frozen_at_random(chain: Chain, layouts: Sequence[StepLayout], known: Collection[str]) -> dict[str, int]:
    """Numbers of frozen elements, by stack, that steps of the stage use and that nothing was loaded into.

    Args:
        chain: Its parameters marked as they are trained.
        layouts: Of all kinds of steps of the stage.
        known: Names of parameters that something was loaded into.
    """
    found: dict[str, int] = {}
    for name, layer in chain.named_layers.items():
        idle = {id(parameter) for parameter in layer.idle_parameters([layout.learnt for layout in layouts])}
        for inner, parameter in layer.named_parameters(prefix=name):
            used = not (parameter.requires_grad or id(parameter) in idle or only_trains(inner) or inner in known)
            if used and ".adapter." not in inner:
                found[layer.stack] = found.get(layer.stack, 0) + whole_numel(parameter)
    return found


def adapted_shapes(chain: Chain) -> Mapping[Role, list[tuple[int, int]]]:
    """Outputs and inputs of the maps that have a trained adapter, by what they are for.

    Of those that lie in one weight, such as queries, keys and values, the sizes of each.
    """
    found: dict[Role, list[tuple[int, int]]] = {}
    for layer in chain.layers:
        for role, one in maps_of(layer).values():
            if one.adapter is not None and one.adapter.up.requires_grad:
                sizes = one.out_features // one.adapter.matrices, one.in_features
                found.setdefault(role, []).append(sizes)
    return found


def _followed(path: str) -> str:
    """The name of the module that a twin's module follows; that of another module itself."""
    return ".".join(part.removeprefix(TWIN) for part in path.split("."))
