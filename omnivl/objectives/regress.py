"""A number from a text and what it goes with, such as a sentiment.

Shapes: B samples, R rows, D width of a pooled fused row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DataKind, is_label, is_pair
from omnivl.data.fields import Field
from omnivl.parts.linear import Linear


@dataclass(frozen=True)
class Regress(Objective):
    """Which number belongs to the text and the image or clip? It is predicted from the fused row as a whole.

    Attributes:
        field: Field of a sample that holds the number.
        loss_kind: ``l1``, the mean absolute difference, or ``l2``, the mean squared one.
        scale: The number is predicted in units of this size, so that outputs are near 1.

    Source: Tsai et al., MulT, arXiv 1906.00295, section 4: sentiment from -3 to 3, trained by the absolute difference.
    """

    kind: Literal["regress"] = "regress"
    field: str = "sentiment"
    loss_kind: Literal["l1", "l2"] = "l1"
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.scale > 0.0, "scale", "above 0")

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """The number."""
        return {self.field: Field("number")}

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per sample."""
        return self.asks(kind, batch_size) if is_pair(kind) and not is_label(kind) else None

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per text."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled"}))

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """A number from a pooled fused row."""
        return NumberHead(sizes.pooled)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean over samples, in units of ``scale``. Metric: ``error``, the mean absolute difference in its own unit."""
        assert isinstance(heads.own, NumberHead)
        far = heads.own(state.pooled(self.key)) - state[f"field/{self.field}"] / self.scale
        loss = far.abs().mean() if self.loss_kind == "l1" else far.square().mean()
        with torch.no_grad():
            metrics = {"error": self.scale * far.abs().mean()}
        return ObjectiveLoss(loss, metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The number for each text, fp32 ``[R]``."""
        assert isinstance(heads.own, NumberHead)
        found: Tensor = self.scale * heads.own(state.pooled(self.key))
        return found


class NumberHead(nn.Module):
    """Linear, GELU, and a number."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = Linear(hidden_size, hidden_size)
        self.output = Linear(hidden_size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """fp32 ``[R]`` from ``[R, D]``."""
        found: Tensor = self.output(F.gelu(self.hidden(pooled))).float().squeeze(-1)
        return found
