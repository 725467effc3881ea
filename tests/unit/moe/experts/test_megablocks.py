"""The adapter to megablocks, with a stand-in for the package that does what its documentation says."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moe.experts.megablocks import import_problem, megablocks_product
from moe.experts.products import Implementation, expert_feed_forward

COUNTS = [5, 0, 17, 1]


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """The rows of each group times its matrix; refuses what the package's kernels refuse."""
    assert (batch_sizes.device.type, batch_sizes.dtype, batch_sizes.shape) == ("cpu", torch.int64, b.shape[:1])
    assert a.dim() == 2 and b.dim() == 3 and a.dtype == b.dtype
    assert a.is_contiguous() and b.is_contiguous()
    assert len(a) == batch_sizes.sum()
    assert a.shape[1] == b.shape[2 if trans_b else 1]
    parts = torch.split(a, batch_sizes.tolist())
    return torch.cat([part @ (own.t() if trans_b else own) for part, own in zip(parts, b, strict=True)])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    package, operations = ModuleType("grouped_gemm"), ModuleType("grouped_gemm.ops")
    operations.gmm = package.ops = gmm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grouped_gemm", package)
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", operations)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("activations", "weights", "left_over"),
    [
        (torch.float32, torch.float32, 3),
        (torch.float32, torch.float32, 0),
        (torch.bfloat16, torch.float32, 3),
        (torch.bfloat16, torch.bfloat16, 3),
    ],
)
def test_its_products_equal_the_loop_forward_and_gradient(
    activations: torch.dtype, weights: torch.dtype, left_over: int
) -> None:
    def run(implementation: Implementation, activations: torch.dtype, weights: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = (4, 32, 8), (4, 32), (4, 32, 8), (4, 8)
        parameters = [(0.3 * torch.randn(shape)).to(weights).requires_grad_() for shape in shapes]
        rows = torch.randn(sum(COUNTS) + left_over, 8)
        rows[sum(COUNTS) :] = 1e4  # rows of no expert
        rows = rows.to(activations).requires_grad_()
        out = expert_feed_forward(rows, torch.tensor(COUNTS), *parameters, implementation=implementation)
        assert out.shape == rows.shape
        used = out[: sum(COUNTS)]
        upstream = torch.randn(used.shape).to(activations)
        grad_rows, *grads = torch.autograd.grad(used, [rows, *parameters], upstream)
        return [used, grad_rows[: sum(COUNTS)], *grads]

    got, wanted = run("megablocks", activations, weights), run("loop", torch.float32, torch.float32)
    assert got[0].dtype == activations
    assert {one.dtype for one in got[2:]} == {weights}
    near = {"rtol": 1e-5, "atol": 1e-5} if activations == torch.float32 else {"rtol": 0.03, "atol": 0.12}
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs, **near)
    assert not any(gradient[1].any() for gradient in got[2:]), "an expert without a row has a gradient of zero"


@pytest.mark.usefixtures("installed")
def test_a_product_by_hand() -> None:
    # Expert 0 has the row (1, 2), expert 1 the row (3, 4): W_0 = [[1, 0], [1, 1]], W_1 = [[2, 0], [0, 1]].
    weight = torch.tensor([[[1.0, 0], [1, 1]], [[2, 0], [0, 1]]])
    product = megablocks_product(torch.tensor([1, 1]))
    rows = torch.tensor([[1.0, 2], [3, 4]])
    assert product(rows, weight, True).tolist() == [[1, 3], [6, 4]]  # x @ W.T
    assert product(rows, weight, False).tolist() == [[3, 2], [6, 4]]  # x @ W
    assert import_problem() is None


def test_why_it_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", None)
    assert import_problem() == "import of grouped_gemm.ops halted; None in sys.modules"
