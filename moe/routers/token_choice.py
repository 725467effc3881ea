"""Routers: which experts serve a token, and with what weight.

Shapes: T tokens, D hidden size, E experts, K choices per token, M modalities.

A router computes in fp32, whatever the activations are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.linear import Linear


@dataclass(frozen=True)
class Choice:
    """What a router says of each token.

    Attributes:
        logits_TE: fp32, without noise; ``-inf`` where the token may not go.
        probs_TE: fp32, the softmax of the logits over experts.
        noisy_TE: fp32, the logits that were ranked; equal to ``logits_TE`` without noise.
        noise: Standard deviation of the noise; 0 for none.
        expert_TK: int64, the chosen experts, best first.
        gate_TK: fp32, their weights, with gradient.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    noisy_TE: Tensor
    noise: float
    expert_TK: Tensor
    gate_TK: Tensor


class Router(nn.Module):
    """What routers share: a linear map without bias from a token to a logit per expert."""

    allowed_ME: Tensor | None

    def __init__(self, hidden_size: int, num_experts: int, allowed: Sequence[Sequence[bool]] | None = None) -> None:
        """Builds the map.

        Args:
            hidden_size: D.
            num_experts: E.
            allowed: Which experts each modality may go to, ``[M][E]``; None: all may go to all.
        """
        super().__init__()
        self.gate = Linear(hidden_size, num_experts, bias=False)
        self.allowed = allowed
        self.register_buffer("allowed_ME", None if allowed is None else torch.tensor(allowed), persistent=False)

    def restore_allowed(self) -> None:
        """Writes ``allowed_ME`` again, which no weights file holds, after the module was built without storage."""
        if self.allowed_ME is not None:
            self.allowed_ME.copy_(torch.tensor(self.allowed))

    def logits(self, x_TD: Tensor, modality_T: Tensor) -> Tensor:
        """fp32 ``[T, E]``, ``-inf`` where a token may not go."""
        logits_TE = F.linear(x_TD.float(), self.gate.weight.float())
        if self.allowed_ME is None:
            return logits_TE
        return logits_TE.masked_fill(~self.allowed_ME[modality_T], -torch.inf)


class TokenChoiceRouter(Router):
    """Each token goes to the K experts of highest probability.

    ``p = softmax(x W + noise)``, gates are the K largest entries of ``p``.

    Source: Riquelme et al., V-MoE, arXiv 2106.05974, eq. 1 and section 2.1: no bias, noise of deviation 1 / E in
        training. Renormalised gates: Shazeer et al., arXiv 1701.06538, eq. 3. Selection bias: Wang et al.,
        arXiv 2408.15664, section 3.
    """

    bias_E: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 1,
        noise: float = 1.0,
        renormalise: bool = False,
        allowed: Sequence[Sequence[bool]] | None = None,
        selection_bias: bool = False,
    ) -> None:
        """Builds a router.

        Args:
            hidden_size: D.
            num_experts: E.
            top_k: K.
            noise: Deviation of the noise in training, in units of 1 / E; 0 for none.
            renormalise: Whether the gates of a token are divided by their sum. With one choice every gate is then 1,
                and the sum counts as a constant, so that the router gets the gradient of the probability's logarithm.
            allowed: Which experts each modality may go to, ``[M][E]``; None: all may go to all.
            selection_bias: Whether to keep a bias that is added for the selection only (``update_selection_bias``).
        """
        super().__init__(hidden_size, num_experts, allowed)
        self.top_k, self.noise, self.renormalise = top_k, noise / num_experts, renormalise
        self.register_buffer("bias_E", torch.zeros(num_experts) if selection_bias else None)

    def forward(self, x_TD: Tensor, modality_T: Tensor) -> Choice:
        """Chooses for ``x [T, D]``; ``modality_T`` int64 is read only where modalities have experts of their own."""
        logits_TE = self.logits(x_TD, modality_T)
        noise = self.noise if self.training else 0.0
        noisy_TE = logits_TE + noise * torch.randn_like(logits_TE) if noise > 0 else logits_TE
        probs_TE = noisy_TE.softmax(-1)
        ranked_TE = probs_TE if self.bias_E is None else probs_TE + self.bias_E.where(probs_TE > 0, -torch.inf)
        expert_TK = ranked_TE.topk(self.top_k, dim=-1).indices
        gate_TK = probs_TE.gather(1, expert_TK)
        if self.renormalise:
            total_T1 = gate_TK.sum(-1, keepdim=True)
            gate_TK = gate_TK / (total_T1.detach() if self.top_k == 1 else total_T1)
        clean_TE = logits_TE.softmax(-1) if noise > 0 else probs_TE
        return Choice(logits_TE, clean_TE, noisy_TE, noise, expert_TK, gate_TK)

    @torch.no_grad()
    def update_selection_bias(self, tokens_per_expert_E: Tensor, rate: float) -> None:
        """Raises the bias of experts that served less than the mean and lowers that of the others.

        Args:
            tokens_per_expert_E: Tokens that each expert served in the step, over all replicas.
            rate: Step of the bias.

        Source: Wang et al., arXiv 2408.15664, algorithm 1: ``b += u * sign(mean load - load)``.
        """
        assert self.bias_E is not None, "the router was built without a selection bias"
        load_E = tokens_per_expert_E.float()
        self.bias_E += rate * (load_E.mean() - load_E).sign()
