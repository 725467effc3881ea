"""Multi-head attention on stacked rows.

Shapes: R rows, Q query positions, K key positions, H heads, D = H * head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.model.linear import Linear


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: ``[R, Q, D]``.
        k: ``[R, K, D]``.
        v: ``[R, K, D]``.
        num_heads: H.
        mask: bool ``[R, K]``, true where a key may be attended to; None for all. Every row needs one true key.
        causal: The last query sees all keys, each earlier one a key less.

    Returns:
        ``[R, Q, D]``, heads joined.
    """
    heads = [x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v)]
    bias = attention_bias(mask, q.shape[1], k.shape[1], causal, q.dtype, q.device)
    scores = heads[0] @ heads[1].transpose(-1, -2) * (1.0 / math.sqrt(heads[0].shape[-1]))
    if bias is not None:
        scores = scores + bias
    out: Tensor = F.softmax(scores, dim=-1) @ heads[2]
    return out.transpose(1, 2).flatten(2)


def attention_bias(
    mask: Tensor | None, num_queries: int, num_keys: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What is added to the scores, ``[R or 1, 1, Q or 1, K]``: 0 where allowed, the lowest number elsewhere.

    The lowest finite number instead of minus infinity keeps a row without any key finite.
    """
    if mask is None and not causal:
        return None
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device) if mask is None else mask[:, None, None, :]
    if causal:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        allowed = allowed & ones.tril(num_keys - num_queries)
    return torch.zeros((), dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one joint projection to queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attends within each row of ``x [R, S, D]``; ``mask`` is bool ``[R, S]``, true for keys."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.out(attention(q, k, v, self.num_heads, mask, causal))
        return out

    def extend(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal attention of new positions ``x [R, l, D]`` to themselves and to what came before.

        Args:
            x: The new positions.
            past: Keys and values side by side of the earlier positions, ``[R, L - l, 2 D]``; None at the start.

        Returns:
            The attended new positions ``[R, l, D]``, and the keys and values of all positions ``[R, L, 2 D]``.
        """
        q, kv = self.qkv(x).split((x.shape[-1], 2 * x.shape[-1]), dim=-1)
        kv = kv if past is None else torch.cat([past, kv], dim=1)
        k, v = kv.chunk(2, dim=-1)
        out: Tensor = self.out(attention(q, k, v, self.num_heads, causal=True))
        return out, kv


class CrossAttention(nn.Module):
    """Multi-head attention from one stream to rows of a memory.

    Keys and values are projected once per memory row; ``rows`` then says which row of the memory each query row reads,
    so that many texts can look at one image without its projection being repeated.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size, 2 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)

    def project(self, memory: Tensor) -> Tensor:
        """Keys and values side by side, ``[R_memory, S, 2 D]``, of ``memory [R_memory, S, D]``."""
        kv: Tensor = self.kv(memory)
        return kv

    def forward(self, x: Tensor, kv: Tensor, rows: Tensor | None = None) -> Tensor:
        """Lets ``x [R, L, D]`` attend to projected memory.

        Args:
            x: Queries' stream.
            kv: From ``project``.
            rows: int64 ``[R]``, the memory row of each row of ``x``; None when they correspond one to one.
        """
        kv = kv if rows is None else kv.index_select(0, rows)
        k, v = kv.chunk(2, dim=-1)
        out: Tensor = self.out(attention(self.q(x), k, v, self.num_heads))
        return out
