"""The table of published figures: its errors, how programs are counted, and that the page agrees with the code."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published.__main__ import rows
from benchmarks.published.automodel import GPT_OSS_20B, GPT_OSS_120B, QWEN_30B
from benchmarks.published.counted import Counted, Execution, counted, machine, on_meta, optimizer_kernels
from benchmarks.published.megatron import MIXTRAL_8X7B, model_flops
from benchmarks.published.open_clip import Clip
from benchmarks.published.routed import RoutedBlock, Sizes, bias_operations
from benchmarks.published.table import PAGE, Row, table
from engine.estimate.hardware import load_hardware


@pytest.mark.parametrize(("estimated", "error"), [(44.0, 0.1), (36.0, -0.1), (40.0, 0.0)])
def test_an_error_is_over_the_published_value(estimated: float, error: float) -> None:
    assert Row("model", "tokens/s", 40.0, estimated, "").error == pytest.approx(error)


def test_the_page_has_the_table_of_today() -> None:
    assert table(rows()) in PAGE.read_text(encoding="utf-8"), "run `python -m benchmarks.published --write`"


class _Block(nn.Module):
    """Four products in a row, with attention behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.maps[1](self.maps[0](x)).view(1, 1, -1, 64)
        seen = F.scaled_dot_product_attention(first, first, first, is_causal=True).view(-1, 64)
        return self.maps[3](F.gelu(self.maps[2](seen)))


def _flops(made: Counted, kind: str) -> tuple[float, float]:
    directions = made.done.forward, made.done.backward
    forward, backward = (
        sum(count * one.flops for one, count in operations.items() if one.kind == kind) for operations in directions
    )
    return forward, backward


def _counted(how: Execution) -> Counted:
    with on_meta():
        block, x = _Block().bfloat16(), torch.zeros(256, 64, dtype=torch.bfloat16)
    x.requires_grad_()
    return counted("0", block, lambda: block(x), how)


def test_what_is_recomputed() -> None:
    """The backward pass has two products for each; every second one, or all, once more but for what nobody needs."""
    one = 2.0 * 256 * 64 * 64
    assert _flops(_counted(Execution()), "product") == (4 * one, 8 * one)
    assert _flops(_counted(Execution(recomputed="every second product")), "product") == (4 * one, (8 + 1) * one)
    assert _flops(_counted(Execution(recomputed="blocks")), "product") == (4 * one, (8 + 3) * one)
    attention = 4.0 * 256 * 256 * 64 / 2
    assert _flops(_counted(Execution(recomputed="every second product")), "attention") == (attention, 2.5 * attention)
    assert _flops(_counted(Execution(recomputed="blocks")), "attention") == (attention, 3.5 * attention)


def test_a_window_looks_at_its_keys_alone() -> None:
    whole, narrow = (_counted(Execution(window=window)) for window in (None, 32))
    assert _flops(narrow, "attention")[0] == _flops(whole, "attention")[0] * 32 / 128  # causal: 128 of 256 on average


def test_a_compiler_joins_what_is_counted() -> None:
    eager, compiled = (_counted(Execution(compiled=compiled)) for compiled in (False, True))
    assert _flops(eager, "product") == _flops(compiled, "product")
    kernels = [Counter(one.done.backward).total() for one in (eager, compiled)]
    assert kernels[1] <= kernels[0]


def test_attention_of_a_kernel() -> None:
    flash, cudnn = load_hardware("h100").attention_share.bf16, machine("h100", "cuDNN").attention_share.bf16
    assert cudnn == pytest.approx(1.61 * flash) and cudnn < 1


@pytest.mark.parametrize(
    ("sizes", "billions"), [(QWEN_30B, 30.5), (GPT_OSS_20B, 20.9), (GPT_OSS_120B, 116.8), (MIXTRAL_8X7B, 46.7)]
)
def test_models_with_experts_have_as_many_parameters_as_their_names_say(sizes: Sizes, billions: float) -> None:
    with on_meta():
        block = RoutedBlock(sizes, sizes.experts)
    blocks = sizes.depth * sum(one.numel() for one in block.parameters())
    assert (blocks + 2 * sizes.words * sizes.width) / 1e9 == pytest.approx(billions, rel=0.01)


def test_operations_of_a_token_as_megatron_counts_them() -> None:
    """12.6 billion parameters of blocks that a token uses, 0.13 of the head, and 12 x 32 x 4096 x 4096 of attention."""
    active = 32 * (4096 * (2 * 4096 + 2 * 1024) + 2 * 3 * 4096 * 14336) + 4096 * 32000
    assert model_flops(MIXTRAL_8X7B) == 6 * active + 12 * 32 * 4096 * 4096


def test_biases_of_experts_are_cut_added_and_joined() -> None:
    """Rows are read and written by the sums and again by the joint, columns of both products: 4 x (2 I + D) numbers."""
    forward, _ = bias_operations(GPT_OSS_20B, 4, 4096)
    moved = sum(count * one.bytes for one, count in forward.items())
    assert moved == pytest.approx(4 * 4096 * 3 * 2880 * 2 + 4096 * 2880 * 2 * 2, rel=0.01)  # and shares of the second


def test_clips_have_as_many_parameters_as_published() -> None:
    for size, patch, millions in (("B", 32, 151.3), ("B", 16, 149.6), ("L", 14, 427.6)):
        with on_meta():
            model = Clip(size, patch, recomputed=False)
        assert sum(one.numel() for one in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


def test_kernels_of_an_optimizer_that_goes_from_tensor_to_tensor() -> None:
    with on_meta():
        models = [nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count)) for count in (1, 2, 4)]
    one, two, four = map(optimizer_kernels, models)
    assert four - two == 2 * (two - one)
    # Decay, two moments of two kernels each, a root, a quotient, a sum, the step: nine, and one of its count.
    assert two - one == 10
