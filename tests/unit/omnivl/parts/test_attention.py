"""Attention by products against torch's fused kernel and against hand-worked numbers."""

import itertools
import math
import sys

import pytest
import torch

from omnivl.chain.positions import chosen_positions
from omnivl.parts import attention
from omnivl.parts.attention import CrossAttention, attention_bias, cross_attention, kept_attention, self_attention
from omnivl.parts.padding import Padding


def both_ways(monkeypatch, call, *inputs):
    """Outputs and gradients of the fused kernel and of explicit products, in double precision."""
    found = []
    for products in (False, True):
        monkeypatch.setattr(attention, "prefers_products", lambda x, products=products: products)
        own = [x.clone().requires_grad_() for x in inputs]
        out = call(*own)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        found.append([out, *(x.grad for x in own)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_equal_fused_self_attention(monkeypatch, causal, masked, rows):
    torch.manual_seed(0)
    qkv = torch.randn(rows, 5, 3 * 8, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[2], [5], [3]])[:rows] if masked else None
    for fused, products in both_ways(monkeypatch, lambda x: self_attention(x, 2, mask, causal), qkv):
        torch.testing.assert_close(fused, products)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_products_equal_fused_cross_attention(monkeypatch, causal, masked):
    torch.manual_seed(0)
    q, kv = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[4], [5], [4]]) if masked else None
    for fused, products in both_ways(monkeypatch, lambda q, kv: cross_attention(q, kv, 2, mask, causal), q, kv):
        torch.testing.assert_close(fused, products)


@pytest.mark.parametrize("products", [False, True])
def test_two_keys_by_hand(monkeypatch, products):
    monkeypatch.setattr(attention, "prefers_products", lambda x: products)
    # One head of size 4, so the scale is 1/2. The query (2 ln 3, 0, 0, 0) has scores ln 3 and 0 with the keys
    # (1, 0, 0, 0) and 0: weights 3/4 and 1/4 on the values (4, 0, 0, 0) and (0, 8, 0, 0).
    q = torch.tensor([[[2 * math.log(3), 0.0, 0.0, 0.0]]])
    kv = torch.tensor([[[1.0, 0, 0, 0, 4, 0, 0, 0], [0.0, 0, 0, 0, 0, 8, 0, 0]]])
    torch.testing.assert_close(cross_attention(q, kv, 1), torch.tensor([[[3.0, 2.0, 0.0, 0.0]]]))
    only_second = torch.tensor([[False, True]])
    torch.testing.assert_close(cross_attention(q, kv, 1, only_second), torch.tensor([[[0.0, 8.0, 0.0, 0.0]]]))


def test_causal_bias_counts_from_the_last_key():
    low = torch.finfo(torch.float32).min
    bias = attention_bias(None, 2, 3, True, torch.zeros(1))
    assert bias[0, 0].tolist() == [[0, 0, low], [0, 0, 0]]
    mask = torch.tensor([[True, False, True]])
    assert attention_bias(mask, 2, 3, True, torch.zeros(1))[0, 0].tolist() == [[0, low, low], [0, low, 0]]
    assert attention_bias(None, 2, 3, False, torch.zeros(1)) is None


@pytest.mark.parametrize("positions", [5, 37])
def test_bf16_is_close_to_fp32(positions: int) -> None:
    torch.manual_seed(0)
    high = torch.randn(2, positions, 3 * 64).bfloat16().float().requires_grad_(True)
    low = high.detach().bfloat16().requires_grad_(True)
    made, exact = self_attention(low, 2), self_attention(high, 2)
    upstream = torch.randn_like(exact)
    made.backward(upstream.bfloat16())
    exact.backward(upstream)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(low.grad.float(), high.grad, rtol=3e-2, atol=3e-2)


def test_cross_attention_reads_the_named_rows_of_memory():
    torch.manual_seed(0)
    layer = CrossAttention(8, 2)
    x, memory = torch.randn(3, 4, 8), torch.randn(2, 5, 8)
    rows = torch.tensor([1, 1, 0])
    together = layer(x, layer.project(memory), rows)
    for row, source in enumerate(rows):
        alone = layer(x[row : row + 1], layer.project(memory[source : source + 1]))
        torch.testing.assert_close(together[row], alone[0])


def test_the_projection_of_a_memory_of_another_width_counts_both_widths() -> None:
    # Five positions of width 3 to keys and values of width 4: 5 x 3 x 8 products, each with its addition.
    assert CrossAttention(4, 2, memory_size=3).project_flops(5) == 2 * 5 * 3 * 8


def by_rows(q, k, v, starts, more_starts, longest, as_long, *, window_size):
    """What the kernel for rows of different lengths computes, as its documentation says."""
    assert torch.equal(starts, more_starts)
    assert starts.dtype == torch.int32
    assert longest == as_long
    ends = starts.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(q)
    out = []
    for first, last in itertools.pairwise(ends):
        assert last - first <= longest
        own = [x[first:last].transpose(0, 1) for x in (q, k, v)]
        assert window_size in ((-1, -1), (-1, 0))
        made = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=window_size == (-1, 0))
        out.append(made.transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("multiple", [1, None, 16])
def test_kept_positions_are_attended_to_row_by_row(monkeypatch, causal, multiple):
    """On a GPU a kernel reads them as they stand; here its documented meaning stands in for it."""
    torch.manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 2, 3, 1, 5, 4, 2, 3, 6, 1, 1, 2, 3])[:, None]
    padding = Padding(mask, chosen_positions(mask, multiple))
    qkv = torch.randn(len(padding.index), 3 * 8, dtype=torch.float64)
    upstream = torch.randn(len(padding.index), 8, dtype=torch.float64) * padding.valid[:, None]
    found = []
    for packed in (False, True):
        monkeypatch.setattr(attention, "packs", lambda qkv, heads, padding, packed=packed: packed)
        monkeypatch.setattr(attention, "_varlen_kernel", lambda: by_rows)
        own = qkv.clone().requires_grad_()
        out = kept_attention(own, padding, 2, mask, causal)
        assert out.isfinite().all()
        (out * upstream).sum().backward()
        found.append((out[padding.valid], own.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_cpu_attends_by_rows():
    mask = torch.tensor([[True, False], [True, True]])
    assert not attention.packs(torch.zeros(3, 3 * 16, dtype=torch.bfloat16), 2, Padding(mask))


def test_a_torch_whose_kernel_has_no_window_attends_by_rows(monkeypatch: pytest.MonkeyPatch):
    assert attention._varlen_kernel() is not None
    for kernel in (lambda query, key, value, is_causal=False: query, None):
        if kernel is None:
            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
        else:
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        attention._varlen_kernel.cache_clear()
        assert attention._varlen_kernel() is None
    attention._varlen_kernel.cache_clear()
