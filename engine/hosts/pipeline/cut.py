"""Where the chain is cut into pipeline stages: into contiguous pieces whose costs are as equal as possible."""

from collections.abc import Sequence
from pathlib import Path

from engine.hosts.pipeline.division import Division, divide_chain
from engine.hosts.pipeline.profile import read_profile
from engine.plan.plan import StagePlan
from omnivl.chain.chain import Chain
from omnivl.chain.state import StepLayout


def divide_stage(chain: Chain, stage: StagePlan) -> Division | None:
    """Passes and layers of each pipeline stage for a stage of the plan; None for other hosts.

    Args:
        chain: Built, on any device, what a stage freezes marked as such.
        stage: The plan's.

    Raises:
        UserError: ``parallel.pipeline_profile`` cannot be read, or is of another chain.
    """
    if stage.parallel.host != "pipeline":
        return None
    cuts = cut(list(stage_costs(chain, stage).values()), stage.parallel.pipeline_stages)
    return divide_chain(chain, cuts, stage.layouts())


def stage_costs(chain: Chain, stage: StagePlan) -> dict[tuple[str, int], float]:
    """Cost of each of ``chain.passes``: seconds if the plan names a profile, estimated operations otherwise.

    Raises:
        UserError: See ``divide_stage``.
    """
    if stage.parallel.pipeline_profile is None:
        return layer_costs(chain, stage.layouts())
    uses = read_profile(Path(stage.parallel.pipeline_profile), stage.name, chain.passes)
    return {one: use.seconds for one, use in uses.items()}


def layer_costs(chain: Chain, layouts: Sequence[StepLayout]) -> dict[tuple[str, int], float]:
    """Floating point operations of each of ``chain.passes``, summed over steps of some layouts.

    Args:
        chain: Built, on any device, what a stage freezes marked as such.
        layouts: One for each kind of step.
    """
    costs: dict[tuple[str, int], float] = {}
    for name, number in chain.passes:
        layer = chain.named_layers[name]
        costs[name, number] = sum(layer.flops(layout, None, number) for layout in layouts)
    return costs


def cut(costs: Sequence[float], stages: int) -> list[range]:
    """Cuts passes into contiguous, non-empty stages so that the largest cost of a stage is smallest.

    Args:
        costs: Of the passes in their order.
        stages: How many; at most as many as passes.
    """
    assert 1 <= stages <= len(costs), f"{len(costs)} passes for {stages} stages"
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[s][n]: smallest possible largest cost of the first n passes in s stages, and where the last stage begins.
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
