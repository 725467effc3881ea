"""The feed-forward slot with a perceptron for each modality (MoME).

Shapes: T tokens, D hidden size, F inner size.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from moe.config import MoMEConfig
from moe.dense import DenseFeedForward
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Tokens

FUSION = "fusion"


def has_fusion(config: MoMEConfig, block: int) -> bool:
    """Whether fused sequences have a perceptron of their own in block ``block`` of a stack."""
    return config.fusion_from is not None and block >= config.fusion_from


def expert_of(config: MoMEConfig, fuses: bool, modality: str, fused: bool) -> str:
    """The name of the perceptron that tokens go to in a block; ``fuses``: see ``has_fusion``."""
    if fused and fuses:
        return FUSION
    return next((name for name, group in config.shared.items() if modality in group), modality)


def experts_of(config: MoMEConfig, slot: Slot) -> list[str]:
    """The names of the perceptrons that tokens of a slot can reach."""
    fuses = has_fusion(config, slot.block)
    reached = [expert_of(config, fuses, modality, fused) for modality in slot.modalities for fused in slot.fused]
    return list(dict.fromkeys(reached))


class ModalityFeedForward(nn.Module):
    """Sends each segment of tokens to the perceptron of its modality; no router is needed.

    Attributes:
        experts: The perceptrons by name.
    """

    def __init__(self, config: MoMEConfig, hidden_size: int, inner_size: int, slot: Slot) -> None:
        """Builds the perceptrons that tokens of the slot can reach.

        Args:
            config: Which modalities share a perceptron, and in which blocks fused sequences have a separate one.
            hidden_size: D.
            inner_size: F.
            slot: Position of the layer in the model.
        """
        super().__init__()
        self._config = config
        # Equal in all blocks that treat tokens alike, which the block's index is not.
        self._fuses = has_fusion(config, slot.block)
        names = experts_of(config, slot)
        self.experts = nn.ModuleDict(
            {name: DenseFeedForward(hidden_size, inner_size, slot.activation, slot.inner_norm_eps) for name in names}
        )

    def idle(self, reached: Collection[tuple[str, bool]]) -> Iterator[nn.Parameter]:
        """Parameters that no token uses where all tokens are of the kinds in ``reached``, (modality, fused) each."""
        met = {expert_of(self._config, self._fuses, modality, fused) for modality, fused in reached}
        for name in self.experts.keys() - met:
            yield from self.experts[name].parameters()

    def forward(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape, segment by segment."""
        runs: list[tuple[str, int]] = []
        for segment in tokens.segments:
            name = expert_of(self._config, self._fuses, segment.modality, segment.fused)
            length = segment.length + (runs.pop()[1] if runs and runs[-1][0] == name else 0)
            runs.append((name, length))
        if len(runs) == 1:
            return FeedForwardOutput(self.experts[runs[0][0]](x).y)
        parts = torch.split(x.reshape(-1, x.shape[-1]), [length for _, length in runs])
        made = [self.experts[name](part).y for (name, _), part in zip(runs, parts, strict=True)]
        return FeedForwardOutput(torch.cat(made).view(x.shape))
