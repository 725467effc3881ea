"""Which passes of a chain each pipeline stage makes, and which stage trains a layer that several stages have.

A stage is a contiguous piece of the chain's passes. A layer that is passed twice may be on two stages: both have its
weights and its momentum twin; one of them, its owner, has its optimizer states and writes it into checkpoints. A pass
that no step of a run uses is left out, so that no stage holds a layer for it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from omnivl.chain.chain import Chain
from omnivl.chain.state import StepLayout


@dataclass(frozen=True)
class Division:
    """A chain cut into pipeline stages.

    Attributes:
        cuts: The passes of each stage, by their indexes in ``Chain.passes``.
        passes: The passes of each stage that are used, in order: the layer's name, and how often it was passed before.
        stages_of: The stages that have each layer, in ascending order, by the layer's name in the chain's order.
        owners: By layer, the stage that trains and saves it.
    """

    cuts: tuple[range, ...]
    passes: tuple[tuple[tuple[str, int], ...], ...]
    stages_of: Mapping[str, tuple[int, ...]]
    owners: Mapping[str, int]

    def held(self, stage: int) -> list[str]:
        """The layers that a stage has."""
        return [name for name, stages in self.stages_of.items() if stage in stages]

    def owned(self, stage: int) -> list[str]:
        """Those of them that the stage trains."""
        return [name for name, owner in self.owners.items() if owner == stage]

    def copied(self, stage: int) -> list[str]:
        """Those of them that another stage trains."""
        return [name for name in self.held(stage) if self.owners[name] != stage]

    @property
    def tied(self) -> list[str]:
        """The layers that more than one stage has."""
        return [name for name, stages in self.stages_of.items() if len(stages) > 1]


def divide(
    passes: Sequence[tuple[str, int]],
    cuts: Sequence[range],
    trained: Mapping[str, int],
    idle: Collection[tuple[str, int]] = (),
) -> Division:
    """Divides a chain among pipeline stages. The same on every process.

    A layer's owner is the stage that, of those that have it, owns the fewest trained parameters so far: without the
    gradient, optimizer states are two thirds of the memory of a trained parameter.

    Args:
        passes: ``Chain.passes``.
        cuts: Passes of each stage, by their indexes; together all.
        trained: Elements of each layer's trained parameters, in the order of the chain's layers.
        idle: Passes to be left out; every layer keeps at least one other.
    """
    made = tuple(tuple(passes[place] for place in part if passes[place] not in idle) for part in cuts)
    stages_of = {
        name: tuple(stage for stage, part in enumerate(made) if any(one[0] == name for one in part)) for name in trained
    }
    assert all(stages_of.values()), "a layer is never passed"
    owners = {name: stages[0] for name, stages in stages_of.items() if len(stages) == 1}
    owned = [sum(trained[name] for name, owner in owners.items() if owner == stage) for stage in range(len(cuts))]
    for name, stages in stages_of.items():
        if len(stages) > 1:
            owners[name] = min(stages, key=lambda stage: owned[stage])
            owned[owners[name]] += trained[name]
    return Division(tuple(cuts), made, stages_of, {name: owners[name] for name in stages_of})


def divide_chain(chain: Chain, cuts: Sequence[range], layouts: Sequence[StepLayout] | None = None) -> Division:
    """Divides a chain whose trained parameters are marked as such; see ``divide``.

    Args:
        chain: Built, on any device.
        cuts: See ``divide``.
        layouts: Layouts of all steps; None keeps every pass.
    """
    idle = idle_passes(chain, layouts) if layouts is not None else set()
    return divide(chain.passes, cuts, trained_elements(chain), idle)


def idle_passes(chain: Chain, layouts: Sequence[StepLayout]) -> set[tuple[str, int]]:
    """The passes that no layout of ``layouts`` uses; the first pass of a layer that is never used is kept."""
    layers = dict(zip(chain.passes, chain.program, strict=True))
    acting = {one for one, layer in layers.items() if any(layer.acts_on_pass(layout, one[1]) for layout in layouts)}
    busy = {name for name, _ in acting}
    return {one for one in layers if one not in acting and (one[1] > 0 or one[0] in busy)}


def trained_elements(chain: Chain) -> dict[str, int]:
    """How many elements of each layer's parameters are trained, in the order of the chain's layers."""
    return {
        name: sum(one.numel() for one in layer.parameters() if one.requires_grad)
        for name, layer in chain.named_children()
    }
