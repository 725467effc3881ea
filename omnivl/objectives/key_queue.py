"""Inputs of contrastive objectives: pairs, keys, and the momentum queue of keys of earlier steps.

The queue is the same on every replica.

Shapes: Q queue entries, J keys of one push, M embeddings of a picture, P projection size.

Source: He et al., MoCo, arXiv 1911.05722, section 3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NAMES = ("visual", "text", "identity", "domain", "valid")


@dataclass(frozen=True)
class Pairs:
    """Embeddings of samples: ``visual`` and ``text`` fp32 ``[B, P]``, L2-normalised, and ``identity`` int64 ``[B]``.

    A picture may have several embeddings, ``[B, M, P]``; see ``similarity``.
    """

    visual: Tensor
    text: Tensor
    identity: Tensor


@dataclass(frozen=True)
class Keys:
    """The embeddings that queries are compared with.

    Attributes:
        visual: fp32 ``[K, P]``, L2-normalised.
        text: fp32 ``[K, P]``, L2-normalised.
        identity: int64 ``[K]``.
        domain: int64 ``[K]``, index into ``DATA_KINDS``.
        valid: Bool ``[K]``; false for queue entries that were never written.
    """

    visual: Tensor
    text: Tensor
    identity: Tensor
    domain: Tensor
    valid: Tensor


class KeyQueue(nn.Module):
    """A ring of fp32 keys with identity, domain and valid bit per entry; buffers only, saved with the model."""

    visual: Tensor
    text: Tensor
    identity: Tensor
    domain: Tensor
    valid: Tensor
    pointer: Tensor

    def __init__(self, size: int, projection_size: int) -> None:
        """Builds an empty queue of ``size`` entries."""
        super().__init__()
        self.size = size
        self.register_buffer("visual", torch.zeros(size, projection_size))
        self.register_buffer("text", torch.zeros(size, projection_size))
        self.register_buffer("identity", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("domain", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def keys(self) -> Keys:
        """The whole queue: the buffers themselves, which the next ``push`` changes. An autograd graph needs a copy."""
        return Keys(**{name: getattr(self, name) for name in _NAMES})

    @torch.no_grad()
    def push(self, keys: Keys) -> None:
        """Writes J keys over the oldest entries, for any J; if J is above Q, the newest Q keys are kept."""
        count = len(keys.identity)
        kept = min(count, self.size)
        offsets = torch.arange(count - kept, count, device=self.pointer.device)
        where = (self.pointer + offsets) % self.size
        for name in _NAMES:
            getattr(self, name)[where] = getattr(keys, name)[count - kept :].to(getattr(self, name).dtype)
        self.pointer.copy_((self.pointer + count) % self.size)
