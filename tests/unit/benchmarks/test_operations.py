"""Sorting a profile's operations."""

import pytest
import torch

from benchmarks.operations import OTHER, OUTSIDE, as_shares, category, shares_of_time


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::bmm", "attention products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention products"),
        ("aten::_scaled_dot_product_efficient_attention", "attention products"),
        ("aten::_softmax_backward_data", "softmax and losses"),
        ("aten::native_layer_norm_backward", "normalisation"),
        ("aten::gelu_backward", "gelu"),
        ("aten::_fused_adamw_", "optimizer, clipping, momentum"),
        ("aten::_foreach_mul_", "optimizer, clipping, momentum"),
        ("Optimizer.step#AdamW.step", "optimizer, clipping, momentum"),
        ("aten::copy_", "data movement"),
        ("aten::_to_copy", "data movement"),
        ("aten::index_select", "data movement"),
        ("aten::add_", "elementwise and sums"),
        ("aten::topk", OTHER),
        ("aten::view", OTHER),
    ],
)
def test_categories(name, title):
    assert category(name) == title


def test_shares_add_up_and_are_sorted():
    # 60 and 20 of 100 microseconds: 20 are left.
    assert as_shares({"a": 20.0, "b": 60.0, "c": 0.0}, 100.0) == pytest.approx({"b": 0.6, "a": 0.2, OUTSIDE: 0.2})
    # Streams in parallel: 150 microseconds of work within 100.
    assert as_shares({"a": 50.0, "b": 100.0}, 100.0) == pytest.approx({"b": 2 / 3, "a": 1 / 3, OUTSIDE: 0.0})


def test_a_profile_of_products_is_mostly_products():
    a = torch.randn(384, 384)
    shares = shares_of_time(lambda: torch.mm(a, a), torch.device("cpu"), repeats=20)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert next(name for name in shares if name != OUTSIDE) == "matrix products"
