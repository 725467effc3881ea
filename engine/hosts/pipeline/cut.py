"""Where the chain is cut into pipeline stages: as evenly as contiguous pieces can be, by what layers cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from engine.hosts.pipeline.profile import read_profile
from engine.plan.plan import StagePlan
from moe.sparse import served_shares
from omnivl.chain.chain import Chain
from omnivl.chain.state import StepLayout
from omnivl.parts.config import ModelConfig

_PREDICTED = 0.2
"""About so many words of masked texts are predicted."""


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
        return layer_costs(chain, stage.model, stage.layouts())
    names = [name for name, _ in chain.named_children()]
    uses = read_profile(Path(stage.parallel.pipeline_profile), stage.name, names)
    return {name: use.seconds for name, use in uses.items()}


def layer_costs(chain: Chain, config: ModelConfig, layouts: Sequence[StepLayout]) -> dict[str, float]:
    """Estimated multiply-adds of each layer's products, summed over steps of some layouts.

    Matrices that get a gradient count once for each row of the layer's stream and three times for forward and backward,
    those of momentum twins once. What attention multiplies beside its matrices is left out.

    Args:
        chain: Built, on any device.
        config: Its configuration.
        layouts: One for each kind of step.
    """
    costs: dict[str, float] = {}
    for name, layer in chain.named_children():
        weight = sum(_matrix_elements(layer, trained) * (3.0 if trained else 1.0) for trained in (True, False))
        costs[name] = sum(weight * _rows(name, config, layout) for layout in layouts)
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


def _matrix_elements(layer: nn.Module, trained: bool) -> float:
    """Elements of matrices that a row meets; of a bank of experts those of the experts that serve a token."""
    shares = served_shares(layer)
    for module in layer.modules():
        if isinstance(module, nn.Embedding):
            shares |= {id(parameter): 0.0 for parameter in module.parameters()}
    return sum(
        parameter.numel() * shares.get(id(parameter), 1.0)
        for parameter in layer.parameters()
        if parameter.dim() > 1 and parameter.requires_grad == trained
    )


def _rows(name: str, config: ModelConfig, layout: StepLayout) -> float:
    """Positions of the layer's stream in a step."""
    stack = name.rstrip("0123456789").rstrip("_")
    visual = _last(layout.visual) * _positions(config, layout)
    text = _last(layout.text) * config.text_length
    alignment = _last(layout.fused) * config.text_length
    generation = layout.batch_size * config.text_length if layout.generation else 0
    streams: Mapping[str, float] = {
        **{"visual": visual, "text": text, "alignment": alignment, "generation": generation},
        **{"embed": visual, "contrast": layout.batch_size, "visual_norm": 0},
        "losses": generation + _PREDICTED * (text + alignment),
    }
    return streams.get(stack, visual + text)


def _last(segments: Mapping[str, slice]) -> int:
    return max((segment.stop for segment in segments.values()), default=0)


def _positions(config: ModelConfig, layout: StepLayout) -> int:
    side = (config.video_size if layout.is_video else config.image_size) // config.patch_size
    return 1 + config.time_positions(layout.num_frames) * side * side
