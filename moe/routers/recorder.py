"""Listens to the routers of a module while it runs, for analysis: what each said of each token, and what was served.

Shapes: T tokens, E experts, K choices per token.

Layers are not changed and keep nothing themselves: hooks are there for as long as a recorder listens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.routers.expert_choice import Picks
from moe.routers.token_choice import Choice
from moe.sparse import SparseFeedForward
from moe.tokens import Tokens


@dataclass(frozen=True)
class Heard:
    """What one call of one router said, on the CPU.

    Attributes:
        layer: The name under which its owner was listed.
        expert_TK: int64, the chosen experts, best first. Where experts choose: those that took the token, and -1 where
            there are no more; K is then the largest number of them.
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
    """Collects what the routers below some modules say until the block ends, call by call.

    Args:
        layers: Modules to listen to, by the name that their calls get. A module without a router says nothing.
    """
    heard: list[Heard] = []
    said: dict[nn.Module, Choice | Picks] = {}

    def keep(owner: nn.Module, choice: Choice | Picks) -> None:
        said[owner] = choice

    def note(layer: str, owner: SparseFeedForward, tokens: Tokens) -> None:
        choice = said.pop(owner)
        if isinstance(choice, Picks):
            expert_TK, gate_TK = choice.by_token()
            served_TK: Tensor | None = expert_TK >= 0
        else:
            expert_TK, gate_TK = choice.expert_TK, choice.gate_TK
            served_TK = owner.routing(choice, tokens.valid).kept_TK
        served_TK = torch.ones_like(expert_TK, dtype=torch.bool) if served_TK is None else served_TK
        probs_TE = choice.probs_TE.detach()
        heard.append(
            Heard(
                layer,
                expert_TK.cpu(),
                gate_TK.detach().float().cpu(),
                served_TK.cpu(),
                torch.special.entr(probs_TE).sum(-1).float().cpu(),
                probs_TE.shape[1],
            )
        )

    hooks = []
    for layer, module in layers.items():
        for owner in module.modules():
            if isinstance(owner, SparseFeedForward):
                hooks.append(owner.router.register_forward_hook(lambda _, inputs, choice, own=owner: keep(own, choice)))
                hooks.append(
                    owner.register_forward_hook(lambda own, inputs, _, layer=layer: note(layer, own, inputs[1]))
                )
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
