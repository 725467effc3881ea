"""Objectives that compare a fused row as a whole with each patch of its image.

Shapes: R rows, N patches of an image, D width of a pooled fused row, P inner width.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from omnivl.chain.demands import CLEAN, Demands, Join
from omnivl.chain.objective import Objective
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DataKind
from omnivl.parts.linear import Linear

Patches = Literal["visual", "fused_visual"]


@dataclass(frozen=True)
class PatchObjective(Objective):
    """Base of the objectives that compare a fused row with the patches of its image.

    Attributes:
        patches: ``visual`` reads the image's own patches; ``fused_visual`` those of the fused row, in architectures
            that have them.
        inner_size: P, the width at which row and patches are compared.
    """

    patches: Patches = "visual"
    inner_size: int = 128

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.inner_size >= 1, "inner_size", "at least 1")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per sample."""
        return self.asks(kind, batch_size) if kind == "image_text" else None

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per text."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled", self.patches}))

    def patch_width(self, sizes: HeadSizes) -> int:
        """Width of the patches that are read."""
        return sizes.widths["visual" if self.patches == "visual" else "fused"]

    def patches_of(self, state: State) -> Tensor:
        """The patches of the image of each fused row, ``[R, N, D']``, row by row without class token."""
        if self.patches == "fused_visual":
            return state.rows("fused_visual", self.key)[:, 1:]
        every = state.rows("visual", CLEAN)[:, 1:]
        rows = state.get("join/rows")
        return every if rows is None else every.index_select(0, rows)


class PatchScores(nn.Module):
    """Projects a fused row and the patches of its image into a common space."""

    def __init__(self, row_size: int, patch_size: int, inner_size: int) -> None:
        super().__init__()
        self.inner_size = inner_size
        self.query, self.key = Linear(row_size, inner_size), Linear(patch_size, inner_size)

    def forward(self, pooled: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 ``[R, P]`` and ``[R, N, P]`` from ``[R, D]`` and ``[R, N, D']``."""
        return self.query(pooled).float(), self.key(patches).float()
