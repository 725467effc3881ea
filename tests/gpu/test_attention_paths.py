"""Whichever kernel a device takes, attention equals its definition in double precision, forward and gradient."""

import math

import pytest
import torch
from torch import Tensor

from omnivl.chain.positions import chosen_positions
from omnivl.parts.attention import cross_attention, kept_attention, packs, self_attention
from omnivl.parts.padding import Padding

HEADS, ROWS, LENGTH, KEYS, SIZE = 2, 3, 37, 65, 32


def by_definition(q: Tensor, kv: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head, in double precision."""
    q, (k, v) = q.double(), kv.double().chunk(2, dim=-1)
    outputs = []
    for head in range(HEADS):
        part = slice(head * SIZE // HEADS, (head + 1) * SIZE // HEADS)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(SIZE / HEADS)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        if causal:
            later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
            scores = scores.masked_fill(later, -math.inf)
        outputs.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_equals_its_definition(device, dtype, tolerance, crossed, masked, causal):
    torch.manual_seed(0)
    keys = KEYS if crossed else LENGTH
    # Rounded to the tested precision first: the reference then starts from the same numbers.
    q, kv = torch.randn(ROWS, LENGTH, SIZE).to(dtype), torch.randn(ROWS, keys, 2 * SIZE).to(dtype)
    mask = torch.arange(keys) < torch.tensor([[LENGTH], [5], [keys]]) if masked else None
    reference = [tensor.double().requires_grad_() for tensor in (q, kv)]
    wanted = by_definition(*reference, mask, causal)
    upstream = torch.randn(wanted.shape).to(dtype)
    wanted.backward(upstream.double())

    own = [tensor.to(device).requires_grad_() for tensor in (q, kv)]
    there = None if mask is None else mask.to(device)
    if crossed:
        found = cross_attention(*own, HEADS, there, causal)
    else:
        found = self_attention(torch.cat(own, dim=-1), HEADS, there, causal)
    assert found.dtype == dtype
    found.backward(upstream.to(device))
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(own, reference, strict=True))]
    for got, expected in pairs:
        off = (got.double().cpu() - expected).norm() / expected.norm()
        assert off < tolerance, off


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_positions(device, dtype, multiple, causal):
    torch.manual_seed(0)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5], [20], [1]])
    padding = Padding(mask, chosen_positions(mask, multiple))
    qkv, upstream = (torch.randn(len(padding.index), size).to(dtype) for size in (3 * SIZE, SIZE))
    upstream = upstream * padding.valid[:, None]
    reference = qkv.double().requires_grad_()
    q, kv = padding.restore(reference).split((SIZE, 2 * SIZE), dim=-1)
    wanted = padding.drop(by_definition(q, kv, mask, causal))
    (wanted * upstream).sum().backward()

    there = Padding(mask.to(device), padding.index.to(device))
    own = qkv.to(device).requires_grad_()
    assert packs(own, HEADS, there) == (device.type == "cuda" and dtype == torch.bfloat16)
    found = kept_attention(own, there, HEADS, mask.to(device), causal)
    assert found.isfinite().all()
    (found * upstream.to(device)).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    pairs = [(found[there.valid].cpu(), wanted[padding.valid]), (own.grad.cpu(), reference.grad)]
    for got, expected in pairs:
        assert (got.double() - expected).norm() / expected.norm() < tolerance
