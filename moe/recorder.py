"""Listens to the routers of a module while it runs, for analysis: what each said of each token.

Shapes: T tokens, E experts, K choices per token.

Routers are not changed and keep nothing themselves: hooks are there for as long as a recorder listens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.expert_choice import Picks
from moe.router import Choice, Router


@dataclass(frozen=True)
class Heard:
    """What one call of one router said, on the CPU.

    Attributes:
        layer: The name under which its owner was listed.
        expert_TK: int64, the chosen experts, best first. Where experts choose: those that took the token, and -1 where
            there are no more; K is then the largest number of them.
        gate_TK: fp32, their weights; 0 beside -1.
        entropy_T: fp32, entropy of the token's probabilities in nats.
        num_experts: E.
    """

    layer: str
    expert_TK: Tensor
    gate_TK: Tensor
    entropy_T: Tensor
    num_experts: int


@contextmanager
def listening(layers: dict[str, nn.Module]) -> Iterator[list[Heard]]:
    """Collects what the routers below some modules say until the block ends, call by call.

    Args:
        layers: Modules to listen to, by the name that their calls get. A module without a router says nothing.
    """
    heard: list[Heard] = []

    def note(layer: str, choice: Choice | Picks) -> None:
        probs_TE = choice.probs_TE.detach()
        expert_TK, gate_TK = choice.by_token() if isinstance(choice, Picks) else (choice.expert_TK, choice.gate_TK)
        entropy_T = torch.special.entr(probs_TE).sum(-1)
        heard.append(
            Heard(
                layer,
                expert_TK.cpu(),
                gate_TK.detach().float().cpu(),
                entropy_T.float().cpu(),
                probs_TE.shape[1],
            )
        )

    hooks = [
        router.register_forward_hook(lambda module, inputs, choice, layer=layer: note(layer, choice))
        for layer, module in layers.items()
        for router in module.modules()
        if isinstance(router, Router)
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
