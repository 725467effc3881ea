"""Rules that ask the chain of a stage, built without storage: which parameters it has, and where it can be cut."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from engine.plan.plan import StagePlan
from engine.plan.sample_rules import StageRule
from engine.plan.yaml import Path, Problem
from engine.step.adapters import adapt, adapted_shapes, maps_of
from engine.step.freeze import freeze_idle, names_parameter
from moe.linear import ROLES
from omnivl.architectures.base import Architecture
from omnivl.architectures.build import outline
from omnivl.chain.chain import Chain
from omnivl.chain.objective import Objective
from omnivl.chain.state import StepLayout
from omnivl.errors import ModelError, did_you_mean


def patterns_name_parameters(stage: StagePlan) -> Iterator[Problem]:
    """Every pattern of ``freeze`` and of ``optimizer.lr_scales`` names a parameter that the stage has."""
    patterns: dict[Path, str] = {("freeze", index): pattern for index, pattern in enumerate(stage.freeze)}
    patterns |= {("optimizer", "lr_scales", pattern): pattern for pattern in stage.optimizer.lr_scales}
    chain = _outline_of(stage.model, stage.objectives) if patterns else None
    if chain is None:
        return
    adapt(chain, stage.lora, layouts=_layouts_of(stage), frozen=stage.freeze)
    parameters = [name for name, _ in chain.named_parameters()]
    for path, pattern in patterns.items():
        if not any(names_parameter(pattern, name) for name in parameters):
            allowed, known = _instead_of(pattern, chain, parameters)
            change = did_you_mean(pattern, known, "name a layer or a part of one")
            yield Problem(path, repr(pattern), f"beginnings of parameter names: {', '.join(allowed)}", change)


def _instead_of(pattern: str, chain: Chain, parameters: Sequence[str]) -> tuple[list[str], list[str]]:
    """What could stand in place of a pattern that names nothing.

    Returns:
        Patterns one part longer than the longest beginning of ``pattern`` that names something; and these with all
        that lies below them.
    """
    parts = pattern.split(".")
    for length in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:length])
        below = [
            [head, *names[length:]]
            for names in (name.split(".") for name in parameters)
            if len(names) > length and fnmatchcase(".".join(names[:length]), head)
        ]
        if below:
            known = [".".join(names[:end]) for names in below for end in range(2, len(names) + 1)]
            return list(dict.fromkeys(".".join(names[:2]) for names in below)), list(dict.fromkeys(known))
    layers = {name: layer for name, layer in chain.named_layers.items() if any(True for _ in layer.parameters())}
    stacks = dict.fromkeys(
        name if layer.level is None or layer.level < 0 else f"{layer.stack}_*" for name, layer in layers.items()
    )
    return list(stacks), [*stacks, *layers]


def adapters_start_from_weights(stage: StagePlan) -> Iterator[Problem]:
    """Frozen maps have learnt something before."""
    if stage.lora is not None and stage.init_from is None and not stage.weights.folders:
        got = "adapters for a stage that starts from random weights, which would be frozen"
        yield Problem(("lora",), got, "null without init_from and weights", "name what it starts from, or remove lora")


def adapters_are_trained(stage: StagePlan) -> Iterator[Problem]:
    """All that ``lora`` is on has a map that the stage trains, and no rank is above what a map can have."""
    layouts = _layouts_of(stage)
    chain = None if stage.lora is None or not layouts else _outline_of(stage.model, stage.objectives)
    if stage.lora is None or chain is None:
        return
    there = {role for layer in chain.layers for role, _ in maps_of(layer).values()}
    adapt(chain, replace(stage.lora, on=ROLES), layouts=layouts, frozen=stage.freeze)
    shapes = adapted_shapes(chain)
    allowed, change = ", ".join(map(repr, shapes)), "name one of them"
    if not shapes:
        allowed, change = "no lora for a stage that trains no map of a block", "thaw one of them, or remove lora"
    if not stage.lora.on:
        yield Problem(("lora", "on"), "nothing", allowed, change)
    for index, role in enumerate(stage.lora.on):
        got = f"{role!r}, of which the model has no map"
        if role in there:
            got = f"{role!r}, of which the stage trains no map: they are frozen, or without a gradient"
        if role not in shapes:
            yield Problem(("lora", "on", index), got, allowed, change)
        elif role in stage.lora.on[:index]:
            yield Problem(("lora", "on", index), f"{role!r} again", "each once", "remove it")
    sizes = [size for role in stage.lora.on for size in shapes.get(role, ())]
    smallest = min(sizes, key=min, default=None)
    if smallest is not None and stage.lora.rank > min(smallest):
        got = f"{stage.lora.rank} for a map of {smallest[0]} x {smallest[1]}"
        yield Problem(("lora", "rank"), got, f"1 to {min(smallest)}", "lower it")


def something_is_trained(stage: StagePlan) -> Iterator[Problem]:
    """A parameter that an objective gives a gradient is not frozen; of adapters see ``adapters_are_trained``."""
    layouts = _layouts_of(stage)
    asks = stage.freeze and stage.lora is None and layouts
    chain = _outline_of(stage.model, stage.objectives) if asks else None
    if chain is None:
        return
    freeze_idle(chain, layouts)
    parameters = [name for name, one in chain.named_parameters() if one.requires_grad]
    if all(any(names_parameter(pattern, name) for pattern in stage.freeze) for name in parameters):
        got = f"{', '.join(stage.freeze)}, which is all that the objectives give a gradient"
        yield Problem(("freeze",), got, "patterns that leave something to train", "thaw a part")


def pipeline_can_be_cut(stage: StagePlan) -> Iterator[Problem]:
    """A pipeline has at most as many stages as passes, and ZeRO stage 0 or 1."""
    parallel = stage.parallel
    if parallel.host != "pipeline":
        return
    if parallel.zero_stage > 1:
        change = "set it to 1, or use host 'zero'"
        got = f"{parallel.zero_stage} with host 'pipeline', which DeepSpeed refuses"
        yield Problem(("parallel", "zero_stage"), got, "0 or 1", change)
    chain = _outline_of(stage.model)
    passes = 0 if chain is None else len(chain.passes)
    if chain is not None and parallel.pipeline_stages > passes:
        got = f"{parallel.pipeline_stages} for a chain of {passes} passes"
        yield Problem(("parallel", "pipeline_stages"), got, f"2 to {passes}", "take fewer stages")


CHAIN_RULES: tuple[StageRule, ...] = (
    patterns_name_parameters,
    adapters_start_from_weights,
    adapters_are_trained,
    something_is_trained,
    pipeline_can_be_cut,
)


def _layouts_of(stage: StagePlan) -> list[StepLayout]:
    """The layouts of a stage whose objectives act on its data; none where other rules have something to say."""
    try:
        layouts = stage.layouts() if stage.data and stage.objectives else []
    except ModelError:
        return []
    return layouts if all(layout.objectives for layout in layouts) else []


def _outline_of(model: Architecture, objectives: Sequence[Objective] = ()) -> Chain | None:
    """The chain of a model; None if it cannot be built, which other rules or the build report."""
    try:
        return outline(model, objectives)
    except ModelError:
        return None
