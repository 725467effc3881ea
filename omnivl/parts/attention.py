"""Multi-head attention on stacked rows.

Shapes: R rows, Q query positions, K key positions, S positions of self-attention, H heads, D = H * head size.

Queries, keys and values are packed as the projections return them: ``[R, S, 3 D]`` for self-attention, ``[R, Q, D]``
and ``[R, K, 2 D]`` for cross-attention. Their gradients are packed in the same way, so that nothing has to be
concatenated.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.parts.linear import Linear, Role
from omnivl.parts.padding import Padding
from omnivl.parts.recompute import recomputed

_BF16_VECTOR = 32
"""Numbers of bf16 in a vector of 512 bits."""


def prefers_products(x: Tensor) -> bool:
    """Whether explicit products are faster than torch's fused kernel.

    They are faster on the CPU in bf16, at all lengths of this model: the fused kernel's backward pass took 25 times as
    long at 16 positions, 28 at 37, 10 at 65 and 4 at 197 (one core, head size 64, torch 2.13). In fp32 the fused kernel
    is as fast or faster, and on other devices it is much faster.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def self_attention(
    qkv: Tensor, num_heads: int, mask: Tensor | None = None, causal: bool = False, scores: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention within each row.

    Args:
        qkv: Queries, keys and values side by side, ``[R, S, 3 D]``.
        num_heads: H.
        mask: bool ``[R, S]``, true where a key may be attended to; None for all. Every row needs one true key.
        causal: Each position sees itself and earlier ones only.
        scores: Added to the scores of all rows alike, with gradient, ``[H, S, S]``; then without ``mask``.

    Returns:
        ``[R, S, D]``, heads joined.
    """
    if scores is not None or not prefers_products(qkv):
        # One cut, whose backward is one concatenation.
        return _fused(qkv.chunk(3, dim=-1), num_heads, mask, causal, scores)
    bias = attention_bias(mask, qkv.shape[1], qkv.shape[1], causal, qkv)
    out: Tensor = _SelfProducts.apply(qkv, bias, num_heads)  # type: ignore[no-untyped-call]
    return out


def packs(qkv: Tensor, num_heads: int, padding: Padding) -> bool:
    """Whether kept positions are attended to as they stand, without rows: on GPUs that have the kernel."""
    if qkv.device.type != "cuda" or qkv.dtype not in (torch.bfloat16, torch.float16) or not padding.in_order:
        return False
    if torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling():
        return False
    size = qkv.shape[-1] // (3 * num_heads)
    able = size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    return able and _varlen_kernel() is not None


@functools.cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """Attention of rows of different lengths that lie end to end; None where this torch has none with a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # takes a second to import
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def kept_attention(
    qkv: Tensor, padding: Padding, num_heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """``self_attention`` of the positions that ``padding`` keeps, ``[n, 3 D]`` to ``[n, D]``.

    Args:
        qkv: Queries, keys and values side by side.
        padding: Of the rows.
        num_heads: H.
        mask: bool ``[R, S]``, that of the padding.
        causal: See ``self_attention``.
    """
    if not packs(qkv, num_heads, padding):
        return padding.drop(self_attention(padding.restore(qkv), num_heads, mask, causal))
    kernel = _varlen_kernel()
    assert kernel is not None, "packs asks for it"
    q, k, v = qkv.view(len(qkv), 3, num_heads, -1).unbind(1)
    starts, longest = padding.starts(), max(padding.length, padding.most_filled)
    window = (-1, 0) if causal else (-1, -1)
    out: Tensor = kernel(q, k, v, starts, starts, longest, longest, window_size=window).flatten(1)
    return out


def cross_attention(
    q: Tensor,
    kv: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    scores: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of one sequence to another.

    Args:
        q: ``[R, Q, D]``.
        kv: Keys and values side by side, ``[R, K, 2 D]``.
        num_heads: H.
        mask: bool ``[R, K]``, true where a key may be attended to; None for all. Every row needs one true key.
        causal: The last query sees all keys, each earlier query one key less than the next.
        scores: Added to the scores of all rows alike, with gradient, ``[H, Q, K]``; then without ``mask``.

    Returns:
        ``[R, Q, D]``, heads joined.
    """
    if scores is None and prefers_products(q):
        bias = attention_bias(mask, q.shape[1], kv.shape[1], causal, q)
        out: Tensor = _CrossProducts.apply(q, kv, bias, num_heads)  # type: ignore[no-untyped-call]
        return out
    return _fused((q, *kv.chunk(2, dim=-1)), num_heads, mask, causal, scores)


def _fused(qkv: Sequence[Tensor], num_heads: int, mask: Tensor | None, causal: bool, scores: Tensor | None) -> Tensor:
    """Attention of queries ``[R, Q, D]``, keys and values ``[R, K, D]`` by torch's kernel."""
    assert scores is None or (mask is None and not causal), "added scores and masks have not met yet"
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in qkv)
    if causal and mask is None and q.shape[2] == k.shape[2]:  # a GPU's fastest kernel takes no mask
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    added = allowed_keys(mask, q.shape[2], k.shape[2], causal, q.device) if scores is None else scores.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2).flatten(2)


def allowed_keys(
    mask: Tensor | None, num_queries: int, num_keys: int, causal: bool, device: torch.device
) -> Tensor | None:
    """Which keys each query may attend to, bool ``[R or 1, 1, Q or 1, K]``; None if all may attend to all."""
    allowed = None if mask is None else mask[:, None, None, :]
    if causal and num_queries > 1:
        earlier = _earlier_keys(num_queries, num_keys, device)
        allowed = earlier if allowed is None else allowed & earlier
    return allowed


def _earlier_keys(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """``allowed_keys`` of causal attention, bool ``[1, 1, Q, K]``, made once for all blocks and steps."""
    if device.type == "meta":  # without values; where operations are counted, each pass counts the same
        return torch.empty(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
    made = _lower_triangle if torch.compiler.is_compiling() else _kept_triangle
    return made(num_queries, num_keys, device)


def _lower_triangle(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else a later training step could not keep it for its backward pass
        ones = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
        return ones.tril(num_keys - num_queries)


_kept_triangle = functools.lru_cache(maxsize=64)(_lower_triangle)


def attention_bias(mask: Tensor | None, num_queries: int, num_keys: int, causal: bool, like: Tensor) -> Tensor | None:
    """``allowed_keys`` as a term of the scores: 0 where allowed, else the lowest number of ``like``'s dtype.

    The lowest finite number instead of minus infinity keeps a row without any key finite.
    """
    allowed = allowed_keys(mask, num_queries, num_keys, causal, like.device)
    if allowed is None:
        return None
    return torch.zeros((), dtype=like.dtype, device=like.device).where(allowed, torch.finfo(like.dtype).min)


def split_heads(x: Tensor, parts: int, num_heads: int) -> Tensor:
    """``[R, S, parts * D]`` to ``[parts, R * H, S, D / H]``, contiguous: one copy for all parts."""
    rows, positions, _ = x.shape
    split = x.reshape(rows, positions, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
    return split.reshape(parts, rows * num_heads, positions, -1)


def join_heads(x: Tensor, num_heads: int) -> Tensor:
    """The reverse of ``split_heads``."""
    parts, _, positions, _ = x.shape
    rows = x.shape[1] // num_heads
    return x.view(parts, rows, num_heads, positions, -1).permute(1, 3, 0, 2, 4).reshape(rows, positions, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output ``[R * H, Q, d]`` and attention ``[R * H, Q, K]`` of split heads."""
    scores = torch.empty(len(q), q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    # beta 0: the old content of ``scores`` is not read; alpha applies the scale within the product.
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    if bias is not None:
        scores.view(bias.shape[0] if len(bias) > 1 else 1, -1, *scores.shape[1:]).add_(bias)
    attention = _softmax(scores)
    return torch.bmm(attention, v), attention


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in the dtype of the scores.

    Torch's bf16 kernels leave the vector units alone where rows are shorter than a vector of bf16: 1.08 ms forward and
    1.70 ms backward for ``[768, 17, 17]``, by way of fp32 0.52 and 0.20 (one core).
    """
    return torch.softmax(scores, dim=-1, dtype=_softmax_dtype(scores)).to(scores.dtype)


def _softmax_dtype(rows: Tensor) -> torch.dtype:
    is_slow = rows.dtype == torch.bfloat16 and rows.shape[-1] < _BF16_VECTOR
    return torch.float32 if is_slow else rows.dtype


def _softmax_backward(grad: Tensor, attention: Tensor) -> Tensor:
    """The gradient of ``_softmax``, from that of its result."""
    dtype = _softmax_dtype(attention)
    return torch._softmax_backward_data(grad.to(dtype), attention.to(dtype), -1, dtype).to(attention.dtype)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Writes the gradients of split heads into ``grad_q``, ``grad_k`` and ``grad_v``."""
    torch.bmm(attention.transpose(1, 2), grad, out=grad_v)
    grad_attention = torch.bmm(grad, v.transpose(1, 2))
    grad_scores = _softmax_backward(grad_attention, attention)
    scale = q.shape[-1] ** -0.5
    torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
    torch.baddbmm(grad_k, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)


class _SelfProducts(torch.autograd.Function):
    """Self-attention by explicit products."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
        heads = split_heads(qkv, 3, num_heads)
        out, attention = _attend(heads[0], heads[1], heads[2], bias)
        ctx.save_for_backward(heads, attention)
        ctx.num_heads = num_heads
        return join_heads(out[None], num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads, attention = ctx.saved_tensors
        grad, grad_heads = split_heads(grads[0], 1, ctx.num_heads)[0], torch.empty_like(heads)
        _attend_backward(grad, heads[0], heads[1], heads[2], attention, grad_heads[0], grad_heads[1], grad_heads[2])
        return join_heads(grad_heads, ctx.num_heads), None, None


class _CrossProducts(torch.autograd.Function):
    """Cross-attention by explicit products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
        q_heads, kv_heads = split_heads(q, 1, num_heads), split_heads(kv, 2, num_heads)
        out, attention = _attend(q_heads[0], kv_heads[0], kv_heads[1], bias)
        ctx.save_for_backward(q_heads, kv_heads, attention)
        ctx.num_heads = num_heads
        return join_heads(out[None], num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, kv, attention = ctx.saved_tensors
        grad, grad_q, grad_kv = split_heads(grads[0], 1, ctx.num_heads)[0], torch.empty_like(q), torch.empty_like(kv)
        _attend_backward(grad, q[0], kv[0], kv[1], attention, grad_q[0], grad_kv[0], grad_kv[1])
        return join_heads(grad_q, ctx.num_heads), join_heads(grad_kv, ctx.num_heads), None, None


class SelfAttention(nn.Module):
    """Multi-head self-attention with one joint projection to queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int, recompute: bool = False) -> None:
        """Builds the projections; with ``recompute`` the backward pass recomputes everything between them."""
        super().__init__()
        self.num_heads, self.recompute = num_heads, recompute
        self.qkv = Linear(hidden_size, 3 * hidden_size, matrices=3)
        self.out = Linear(hidden_size, hidden_size)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield from (("attention", self.qkv), ("attention", self.out))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        padding: Padding | None = None,
        scores: Tensor | None = None,
        beside: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within each row.

        Args:
            x: ``[R, S, D]``, or with ``padding`` the kept positions ``[n, D]``; the result has the same shape.
            mask: bool ``[R, S]``, true where a key may be attended to.
            causal: Whether each position sees itself and earlier ones only.
            padding: Which positions are left out of ``x``.
            scores: Added to the scores of all rows alike, ``[H, S, S]``.
            beside: Whether to return ``x`` too, for whatever else reads it (``moe.linear.linear_beside``).
        """
        qkv, x = self.qkv(x, beside=True) if beside else (self.qkv(x), x)
        if padding is None:
            attended = recomputed(self.recompute, self_attention, qkv, self.num_heads, mask, causal, scores)
        else:
            assert scores is None, "added scores and masks have not met yet"
            attended = recomputed(self.recompute, kept_attention, qkv, padding, self.num_heads, mask, causal)
        out: Tensor = self.out(attended)
        return (out, x) if beside else out

    def flops(self, tokens: float, positions: float) -> float:
        """Operations on one row, forward: projections of ``tokens`` positions, attention over all ``positions``."""
        size = self.qkv.in_features
        return tokens * 8 * size**2 + 4 * positions**2 * size

    def first_flops(self, positions: float) -> float:
        """Operations of ``first`` on one row of ``positions`` positions, forward."""
        size = self.qkv.in_features
        return (1 + positions) * 4 * size**2 + 4 * positions * size

    def first(self, x: Tensor, mask: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        """The output of ``forward`` at the first position of each row alone, ``[R, 1, D]``; arguments as there."""
        q, kv = self.qkv.part(x[:, :1], 0, 1), self.qkv.part(x, 1, 3)
        own = None if scores is None else scores[:, :1]
        out: Tensor = self.out(cross_attention(q, kv, self.num_heads, mask, scores=own))
        return out

    def extend(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal attention of new positions ``x [R, l, D]`` to themselves and to the earlier ones.

        Args:
            x: The new positions.
            past: Keys and values side by side of the earlier positions, ``[R, L - l, 2 D]``; None at the start.

        Returns:
            The attended new positions ``[R, l, D]``, and the keys and values of all positions ``[R, L, 2 D]``.
        """
        q, kv = self.qkv(x).split((x.shape[-1], 2 * x.shape[-1]), dim=-1)
        kv = kv if past is None else torch.cat([past, kv], dim=1)
        out: Tensor = self.out(cross_attention(q, kv, self.num_heads, causal=True))
        return out, kv


class CrossAttention(nn.Module):
    """Multi-head attention from one stream to rows of a memory.

    Keys and values are projected once per memory row. ``rows`` says which row of the memory each query row reads, so
    that many texts can look at one image that is projected once.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, recompute: bool = False, memory_size: int | None = None
    ) -> None:
        """Builds the projections.

        Args:
            hidden_size: D of the stream.
            num_heads: H.
            recompute: Whether the backward pass recomputes everything between the projections.
            memory_size: Width of the memory; None: D.
        """
        super().__init__()
        self.num_heads, self.recompute = num_heads, recompute
        self.q = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size if memory_size is None else memory_size, 2 * hidden_size, matrices=2)
        self.out = Linear(hidden_size, hidden_size)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield from (("cross_attention", one) for one in (self.q, self.kv, self.out))

    def flops(self, tokens: float, positions: float, seen: float) -> float:
        """Operations on one row, forward, without ``project``.

        Args:
            tokens: Positions whose queries are projected.
            positions: All positions of the row; all of them attend.
            seen: Positions of a row of the memory.
        """
        size = self.q.in_features
        return tokens * 4 * size**2 + 4 * positions * seen * size

    def project_flops(self, seen: float) -> float:
        """Operations of ``project`` on one row of the memory, forward."""
        return seen * 2.0 * self.kv.in_features * self.kv.out_features

    def project(self, memory: Tensor) -> Tensor:
        """Keys and values side by side, ``[R_memory, S, 2 D]``, of ``memory [R_memory, S, D]``."""
        kv: Tensor = self.kv(memory)
        return kv

    def project_beside(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """``project``, and the memory for whatever else reads it (``moe.linear.linear_beside``)."""
        made: tuple[Tensor, Tensor] = self.kv(memory, beside=True)
        return made

    def forward(
        self,
        x: Tensor,
        kv: Tensor,
        rows: Tensor | None = None,
        padding: Padding | None = None,
        mask: Tensor | None = None,
        beside: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Lets a stream attend to projected memory.

        Args:
            x: ``[R, L, D]``, or with ``padding`` the kept positions ``[n, D]``; the result has the same shape.
            kv: From ``project``.
            rows: int64 ``[R]``, the memory row of each row of ``x``; None when they correspond one to one.
            padding: Which positions are left out of ``x``.
            mask: bool ``[R_memory, S]``, which positions of the memory may be attended to; None for all.
            beside: Whether to return ``x`` too, for whatever else reads it (``moe.linear.linear_beside``).
        """
        kv = kv if rows is None else kv.index_select(0, rows)
        mask = mask if mask is None or rows is None else mask.index_select(0, rows)
        q, x = self.q(x, beside=True) if beside else (self.q(x), x)
        q = q if padding is None else padding.restore(q)
        attended = recomputed(self.recompute, cross_attention, q, kv, self.num_heads, mask)
        out: Tensor = self.out(attended if padding is None else padding.drop(attended))
        return (out, x) if beside else out
