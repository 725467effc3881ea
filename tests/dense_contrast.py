"""Contrastive losses by their formulas, on the whole matrix in fp64: what the tiles are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.parts.similarity import similarity


@dataclass(frozen=True)
class Dense:
    """A problem as a whole: all keys, those of the batch first.

    Attributes:
        query: ``[B, P]`` or ``[B, M, P]``.
        keys: ``[K, P]`` or ``[K, M, P]``.
        scale: Scalar.
        positive: Bool ``[B, K]``, valid keys only.
        valid: Bool ``[K]``.
        log_weights: ``[K]``.
        options: ``reduction``, ``label_smoothing``, and of a teacher ``query`` and ``alpha``.
    """

    query: Tensor
    keys: Tensor
    scale: Tensor
    positive: Tensor
    valid: Tensor
    log_weights: Tensor
    options: Mapping[str, object]

    def loss(self) -> Tensor:
        """``sum_k t_ik (z_i - l_ik)`` of each query, fp64 ``[B]``."""
        logits = self.scale.double() * similarity(self.query.double(), self.keys.double())
        shifted = torch.where(self.positive, logits, logits + self.log_weights.double())
        z = shifted.masked_fill(~self.valid, float("-inf")).logsumexp(-1)
        targets = self.targets()
        # Nothing is asked of a query without a target.
        return torch.where(targets.sum(-1) > 0, targets.sum(-1) * z, 0.0) - (targets * logits).sum(-1)

    @torch.no_grad()
    def targets(self) -> Tensor:
        """fp64 ``[B, K]``."""
        hard = self.positive.double()
        if self.options.get("reduction", "mean") == "mean":
            hard = hard / hard.sum(-1, keepdim=True).clamp(min=1)
        if (teacher := self.options.get("teacher")) is not None:
            assert isinstance(teacher, Tensor)
            logits = self.scale.double() * similarity(teacher.double(), self.keys.double())
            soft = logits.masked_fill(~self.valid, float("-inf")).softmax(-1)
            alpha = self.options["alpha"]
            assert isinstance(alpha, float)
            return alpha * soft + (1 - alpha) * hard
        smoothing = self.options.get("label_smoothing", 0.0)
        assert isinstance(smoothing, float)
        return (1 - smoothing) * hard + smoothing / hard.shape[1]


def sigmoid_loss(query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``- sum_j log sigmoid(z_ij (scale q_i . k_j + bias))`` of each query, fp64 ``[B]``; key i is the pair."""
    logits = scale.double() * similarity(query.double(), keys.double()) + bias.double()
    signs = 2 * torch.eye(len(query), dtype=torch.float64) - 1
    return -F.logsigmoid(signs * logits).sum(-1)
