"""Freezing parameters of the chain: those that the plan names, and those that no step of a stage uses."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from engine.step.whole import whole_numel, whole_shape
from moe.experts.bank import ExpertBank
from omnivl.chain.backward import VISUAL, Backward
from omnivl.chain.chain import Chain
from omnivl.chain.names import only_trains
from omnivl.chain.state import StepLayout
from omnivl.errors import ModelError, UserError, did_you_mean
from omnivl.parts.sizes import Transformer


def freeze(chain: Chain, patterns: Sequence[str], where: str) -> list[str]:
    """Freezes every parameter that a pattern names, and says what of the backward pass layers have left.

    To be called with no patterns too, after adapters were added, which freeze what they adapt.

    Args:
        chain: The model.
        patterns: Names or shell patterns, each of a parameter or of the beginning of its name up to a dot: ``embed``,
            ``visual_*``, ``text_00.attention``.
        where: Path in the plan, for the message.

    Returns:
        Names of the frozen parameters that would have been trained otherwise.

    Raises:
        UserError: A pattern names nothing.
        ModelError: A block is of a branch that nothing before it starts.
    """
    frozen: list[str] = []
    parameters = dict(chain.named_parameters())
    for index, pattern in enumerate(patterns):
        for name in named_by(pattern, list(parameters), f"{where}.{index}"):
            if parameters[name].requires_grad:
                parameters[name].requires_grad_(False)
                frozen.append(name)
    _count_backward(chain)
    return frozen


def _count_backward(chain: Chain) -> None:
    """Sets ``ChainLayer.backward`` by what is trained, before parameters are frozen that no step uses.

    A layer of a branch follows what is trained on that branch, and all that came together before; other layers follow
    all before them.

    Raises:
        ModelError: Nothing before a block is of its branch, so that nothing that it reads would seem to be trained.
    """
    passed: set[str | None] = set()
    trained: set[str | None] = set()
    for name, _ in chain.passes:
        layer = chain.named_layers[name]
        is_block = layer.branch is not None and layer.level is not None and layer.level >= 0
        if is_block and not passed & {layer.branch, None}:
            raise ModelError(_unstarted_message(name, layer.branch, passed))
        own = [(one, parameter) for one, parameter in layer.named_parameters() if not only_trains(one)]
        passed |= {layer.branch, *(layer.branch_of(one) for one, _ in own)}
        trained |= {layer.branch_of(one) for one, parameter in own if parameter.requires_grad}
        if layer.branch is None and trained:
            trained.add(None)
        pixels = [(one, parameter) for one, parameter in own if layer.branch_of(one) == VISUAL]
        inputs = bool(trained & {layer.branch, None})
        layer.backward = Backward(inputs, _trained_share(own), _trained_share(pixels))


def _trained_share(named: Iterable[tuple[str, nn.Parameter]]) -> float:
    """The share of the elements of matrices that are trained; all of them where there is no matrix."""
    sizes = [(whole_numel(one), one.requires_grad) for _, one in named if len(whole_shape(one)) > 1]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes) if sizes else 1.0


def named_by(pattern: str, parameters: Sequence[str], where: str) -> list[str]:
    """The parameters that a pattern names, see ``freeze``.

    Raises:
        UserError: There is none.
    """
    found = [name for name in parameters if names_parameter(pattern, name)]
    if not found:
        raise UserError(_nothing_message(where, pattern, parameters))
    return found


def freeze_idle(chain: Chain, layouts: Sequence[StepLayout]) -> dict[str, int]:
    """Freezes every parameter that no step of a stage gives a gradient.

    Otherwise they would be updated with a gradient of zero, hence decayed: a decoder would shrink in the stages before
    its own. They would also take moments and communication. Those that no step even reads are marked (``is_unread``).

    Args:
        chain: The model.
        layouts: Of all kinds of steps of the stage.

    Returns:
        Number of elements that would have been trained otherwise, by stack.
    """
    idle: dict[str, int] = {}
    learnt = [layout.learnt for layout in layouts]
    for layer in chain.layers:
        for parameter in layer.idle_parameters(learnt):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                idle[layer.stack] = idle.get(layer.stack, 0) + whole_numel(parameter)
        for parameter in layer.unread_parameters(layouts):
            assert not parameter.requires_grad, "what nobody reads gets no gradient"
            parameter.unread = True  # type: ignore[attr-defined]
    return idle


def is_unread(parameter: nn.Parameter) -> bool:
    """Whether no step of the stage reads the parameter; evaluations may."""
    return getattr(parameter, "unread", False)


def store_frozen(chain: Chain, stacks: Mapping[str, Transformer]) -> dict[str, int]:
    """Brings what is frozen to the precision that its stack says, see ``Transformer.frozen_dtype``.

    To be called when parameters are frozen and filled, before a host takes the chain; under ZeRO-3 they may be sharded
    already.

    Args:
        chain: The model.
        stacks: The model's, by name.

    Returns:
        Number of elements that are kept in another type than fp32, by stack.
    """
    kept: dict[str, int] = {}
    for layer in chain.layers:
        sizes = stacks.get(layer.stack)
        if sizes is None or sizes.frozen_dtype == "fp32":
            continue
        banks = {id(one) for module in layer.modules() if isinstance(module, ExpertBank) for one in module.parameters()}
        for name, parameter in layer.named_parameters():
            is_table = len(whole_shape(parameter)) > 1 and id(parameter) not in banks
            if parameter.requires_grad or only_trains(name) or not is_table:
                continue
            _store(parameter, torch.bfloat16)
            kept[layer.stack] = kept.get(layer.stack, 0) + whole_numel(parameter)
    return kept


@torch.no_grad()
def _store(parameter: Any, dtype: torch.dtype) -> None:
    """Changes the type of a parameter and, under ZeRO-3, of the share of it that this process holds."""
    parameter.data = parameter.data.to(dtype)
    if (share := getattr(parameter, "ds_tensor", None)) is not None:
        pinned = share.is_pinned()
        share.data = share.data.to(dtype).pin_memory() if pinned else share.data.to(dtype)


def names_parameter(pattern: str, parameter: str) -> bool:
    """Whether a pattern names a parameter, see ``freeze``."""
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def _nothing_message(where: str, pattern: str, parameters: Sequence[str]) -> str:
    layers = list(dict.fromkeys(name.split(".")[0] for name in parameters))
    change = did_you_mean(pattern, [*layers, *parameters], "name a layer or a part of one")
    return f"{where}: got {pattern!r}, which names no parameter; layers are {', '.join(layers)}; {change}"


def _unstarted_message(name: str, branch: str | None, passed: Collection[str | None]) -> str:
    others = ", ".join(map(repr, sorted(str(one) for one in passed))) or "none"
    return (
        f"layer {name!r}: got the branch {branch!r}, which no layer before it is of; allowed are None and those before "
        f"it: {others}; let branch_of of the layer that makes its input name {branch!r}"
    )
