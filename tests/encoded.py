"""States after the encoders, for tests of later layers and losses."""

from collections.abc import Sequence

import torch

from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Objective
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DataKind
from omnivl.parts.project import Project
from omnivl.parts.sizes import MomentumConfig

B, S, L, D = 3, 5, 4, 6
MOMENTUM = MomentumConfig(decay=0.75)
SIZES = HeadSizes(dict.fromkeys(("visual", "text", "fused", "generation"), D), L, 11, 4, 2, 1, 4)


def encoded(
    objectives: Sequence[Objective], kind: DataKind = "image_text", identity: tuple[int, ...] = (1, 2, 3)
) -> State:
    """What the encoders would hand over: random streams of the sizes that the layout asks for."""
    layout = plan_layout(objectives, kind, B, 1)
    random = torch.Generator().manual_seed(0)
    tensors = {"identity": torch.tensor(identity), "vlm/uniforms": torch.rand(B, 2, generator=random)}
    for name, segments, length in (("visual", layout.visual, S), ("text", layout.text, L)):
        rows = max((segment.stop for segment in segments.values()), default=0)
        if rows:
            tensors[name] = torch.randn(rows, length, D, generator=random)
    if layout.text:
        tensors["text_mask"] = torch.rand(len(tensors["text"]), L, generator=random) < 0.8
    if layout.twins:
        tensors["momentum_visual"] = torch.randn(B, S, D, generator=random)
        tensors["momentum_text"] = torch.randn(B, L, D, generator=random)
    return State(tensors, layout)


def perturb(layer: Project) -> None:
    """Moves the online projections away from their twins, as a step would."""
    with torch.no_grad():
        for projection in (layer.visual_projection, layer.text_projection):
            projection.weight.add_(torch.randn_like(projection.weight))
