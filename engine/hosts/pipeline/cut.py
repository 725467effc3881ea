"""Where the chain is cut into pipeline stages: as evenly as contiguous pieces can be, by what layers cost."""

from collections.abc import Sequence
from pathlib import Path

from engine.hosts.pipeline.profile import read_profile
from engine.plan.plan import StagePlan
from omnivl.chain.chain import Chain
from omnivl.chain.flops import FORWARD_AND_BACKWARD
from omnivl.chain.state import StepLayout


def pipeline_cuts(chain: Chain, stage: StagePlan) -> list[range]:
    """The layers of each pipeline stage of a plan's stage, by their places in the chain; none for other hosts.

    Raises:
        UserError: ``parallel.pipeline_profile`` cannot be read, or is of another chain.
    """
    if stage.parallel.host != "pipeline":
        return []
    return cut(list(stage_costs(chain, stage).values()), stage.parallel.pipeline_stages)


def stage_costs(chain: Chain, stage: StagePlan) -> dict[str, float]:
    """What a layer costs: measured seconds where the plan names a profile, estimated operations otherwise.

    Raises:
        UserError: See ``pipeline_cuts``.
    """
    if stage.parallel.pipeline_profile is None:
        return layer_costs(chain, stage.layouts())
    names = [name for name, _ in chain.named_children()]
    uses = read_profile(Path(stage.parallel.pipeline_profile), stage.name, names)
    return {name: use.seconds for name, use in uses.items()}


def layer_costs(chain: Chain, layouts: Sequence[StepLayout]) -> dict[str, float]:
    """Floating point operations of each layer, all its passes together, summed over steps of some layouts.

    A layer of which nothing is trained has no backward pass, and counts a third.

    Args:
        chain: Built, on any device, its trained parameters marked as such.
        layouts: One for each kind of step.
    """
    costs = dict.fromkeys(chain.named_layers, 0.0)
    for name, number in chain.passes:
        layer = chain.named_layers[name]
        trains = any(parameter.requires_grad for parameter in layer.parameters())
        flops = sum(layer.flops(layout, None, number) for layout in layouts)
        costs[name] += flops if trains else flops / FORWARD_AND_BACKWARD
    return costs


def cut(costs: Sequence[float], stages: int) -> list[range]:
    """Cuts layers into contiguous stages so that the dearest stage costs least; every stage gets a layer.

    Args:
        costs: Of the layers in their order.
        stages: How many; at most as many as layers.
    """
    assert 1 <= stages <= len(costs), f"{len(costs)} layers for {stages} stages"
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[s][n]: least dearest cost of the first n layers in s stages, and where the last of them begins.
    best = [{0: (0.0, 0)}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[float, int]] = {}
        for end in range(stage, len(costs) - (stages - stage) + 1):
            choices = ((max(best[-1][begin][0], sums[end] - sums[begin]), begin) for begin in best[-1] if begin < end)
            row[end] = min(choices)
        best.append(row)
    found, end = [], len(costs)
    for stage in range(stages, 0, -1):
        begin = best[stage][end][1]
        found.append(range(begin, end))
        end = begin
    return found[::-1]
