"""The parts of every router: options that build it, a module that routes tokens, and an update after an optimizer step.

Shapes: T tokens, D hidden size, E experts, M modalities.

A router computes in fp32, whatever the activations are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.linear import Linear
from moe.routers.losses import RouterLossConfig
from moe.routers.routed import Routed

Allowed = Sequence[Sequence[bool]] | None
"""Which experts each modality may go to, ``[M][E]``; None: all may go to all."""


class Router(nn.Module, ABC):
    """Decides which experts serve a token, and with what weight."""

    allowed_ME: Tensor | None

    def __init__(self, allowed: Allowed = None) -> None:
        """Stores which experts are allowed."""
        super().__init__()
        self.allowed = allowed
        self.register_buffer("allowed_ME", None if allowed is None else torch.tensor(allowed), persistent=False)

    @abstractmethod
    def forward(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None = None) -> Routed:
        """Routes ``x [T, D]``.

        Args:
            x_TD: Tokens, in the dtype of the activations.
            modality_T: int64, the number of each token's modality.
            valid_T: bool; false for padding, which no expert may serve. None: there is no padding.
        """

    @property
    def balances(self) -> bool:
        """Whether ``after_step`` changes anything; only then choices are counted for it."""
        return False

    def after_step(self, tokens_per_expert_E: Tensor) -> None:
        """Updates state that is not trained by a gradient, after an optimizer step. Does nothing by default.

        Args:
            tokens_per_expert_E: fp32, choices of each expert in the step, served or dropped, over all replicas.
        """

    def restore_allowed(self) -> None:
        """Sets ``allowed_ME`` again, which is in no weights file, after the module was built without storage."""
        if self.allowed_ME is not None:
            self.allowed_ME.copy_(torch.tensor(self.allowed))

    def only_allowed(self, logits_TE: Tensor, modality_T: Tensor) -> Tensor:
        """The logits, ``-inf`` for experts that a token may not use."""
        return logits_TE if self.allowed_ME is None else logits_TE.masked_fill(~self.allowed_ME[modality_T], -torch.inf)


class LinearRouter(Router):
    """A router whose logits are a linear map of the token, without bias."""

    def __init__(self, hidden_size: int, num_experts: int, allowed: Allowed = None) -> None:
        """Builds the map.

        Args:
            hidden_size: D.
            num_experts: E.
            allowed: See ``Allowed``.
        """
        super().__init__(allowed)
        self.gate = Linear(hidden_size, num_experts, bias=False, matrices=0)

    def logits(self, x_TD: Tensor, modality_T: Tensor) -> Tensor:
        """fp32 ``[T, E]``, ``-inf`` where a token may not go."""
        return self.only_allowed(F.linear(x_TD.float(), self.gate.weight.float()), modality_T)


class RouterConfig(ABC):
    """The options of a router, as plain data: a frozen dataclass with a ``kind``.

    A new router is one file, with such a class and the module that it builds, and one entry in
    ``moe.routers.AnyRouterConfig``.

    Attributes:
        kind: Tells it apart from the others.
        losses: Weights of the auxiliary losses. A router with a loss of its own has a subclass of ``RouterLossConfig``.
    """

    kind: str
    losses: RouterLossConfig

    tokens_choose: ClassVar[bool] = True
    """Whether each token chooses experts, so that single choices can be dropped."""

    @property
    @abstractmethod
    def experts_per_token(self) -> float:
        """Mean number of experts that serve a token if there is no capacity limit."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's experts depend on tokens that come after it.

        Such a router cannot be used in autoregressive decoding.
        """
        return False

    @property
    def fewest_experts(self) -> int:
        """Least number of experts that each modality must be allowed to use."""
        return 1

    @abstractmethod
    def build(self, hidden_size: int, num_experts: int, allowed: Allowed) -> Router:
        """The module, with fresh weights.

        Args:
            hidden_size: D.
            num_experts: E.
            allowed: See ``Allowed``.
        """

    def without_noise(self) -> Self:
        """The same options for a router that draws no random numbers."""
        return self

    def flops(self, hidden_size: int, num_experts: int) -> float:
        """Operations of one token's products, forward; here those of a ``LinearRouter``."""
        return 2.0 * hidden_size * num_experts


def require(holds: bool, message: str) -> None:
    """Refuses options of a filling or of a router.

    Raises:
        ValueError: ``holds`` is false.
    """
    if not holds:
        raise ValueError(message)
