"""Records the outputs of the routers of a module while it runs, for analysis.

Shapes: T tokens, E experts, K choices per token.

Layers are not changed and store nothing: the hooks are removed when the block ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.routers.base import Router
from moe.routers.routed import Routed


@dataclass(frozen=True)
class Heard:
    """The result of one call of one router, on the CPU.

    Attributes:
        layer: The name of its module in ``layers``.
        expert_TK: int64, the experts of each token, highest weight first; -1 where it has no further one. With expert
            choice, K is the largest number of experts that took one token.
        gate_TK: fp32, their weights; 0 beside -1.
        served_TK: bool, whether the expert serves the token: False above its capacity, for padding, and beside -1.
        entropy_T: fp32, entropy of the token's probabilities in nats.
        num_experts: E.
    """

    layer: str
    expert_TK: Tensor
    gate_TK: Tensor
    served_TK: Tensor
    entropy_T: Tensor
    num_experts: int


@contextmanager
def listening(layers: dict[str, nn.Module]) -> Iterator[list[Heard]]:
    """Collects the results of the routers in some modules until the block ends, call by call.

    Args:
        layers: Modules to record, by the names that their calls get. A module without a router gives no calls.
    """
    heard: list[Heard] = []

    def note(layer: str, routed: Routed) -> None:
        choices, probs_TE = routed.choices(), routed.said.probs_TE.detach()
        heard.append(
            Heard(
                layer,
                choices.expert_TK.cpu(),
                choices.gate_TK.float().cpu(),
                choices.served_TK.cpu(),
                torch.special.entr(probs_TE).sum(-1).float().cpu(),
                probs_TE.shape[1],
            )
        )

    def hook_of(layer: str) -> Any:
        return lambda _, inputs, routed: note(layer, routed)

    hooks = [
        module.register_forward_hook(hook_of(layer))
        for layer, root in layers.items()
        for module in root.modules()
        if isinstance(module, Router)
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
