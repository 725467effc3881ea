"""Gradients that are sent in bf16: half of the bytes, and the same training but for their rounding."""

from collections import Counter
from typing import Any

import pytest
import test_layouts as layouts
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.hosts.pipeline.scalars import MOST_SCALARS

pytestmark = pytest.mark.distributed

STEPS = 3
LARGE = 64
"""Elements of a tensor from which on it is not one of the sums that are reported."""


class Reduced(TorchDispatchMode):
    """Bytes of floating point tensors that are reduced, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.overloadpacket.__name__:
            sent = args[1] if "reduce_scatter" in func.overloadpacket.__name__ else args[0]
            for tensor in [sent] if isinstance(sent, torch.Tensor) else sent:
                reports = MOST_SCALARS < tensor.numel() < MOST_SCALARS + LARGE  # what a pipeline's step reports
                if tensor.is_floating_point() and tensor.numel() > LARGE and not reports:
                    self.found[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        return func(*args, **(kwargs or {}))


def trained(hosts: list[str], model_name: str) -> dict[str, dict[str, Any]]:
    """Worker: some steps of each host."""
    model, report = layouts.Model(model_name), {}
    for name in hosts:
        host = layouts.make_host(name, model)
        with Reduced() as reduced:
            results = [host.step(model.batches(step, host.gather), step) for step in range(STEPS)]
        report[name] = {"results": results, "reduced": dict(reduced.found), "weights": host.full_weights()}
    return report


def test_rounding_is_all_that_differs(run_distributed: Any) -> None:
    check(run_distributed, 2, ["plain", *layouts.ZERO, "pipe2-zero1"], "synthetic")


@pytest.mark.full
def test_rounding_is_all_that_differs_where_experts_are_cut(run_distributed: Any) -> None:
    check(run_distributed, 4, ["zero2-ep2", "zero3-ep2", "pipe2-zero0", "pipe2-zero1"], "real-limoe")


def check(run_distributed: Any, processes: int, names: list[str], model: str) -> None:
    arguments = {"hosts": [*names, *(f"{name}-low" for name in names)], "model_name": model}
    report = run_distributed(trained, processes=processes, limit=300, **arguments)[0]
    for name in names:
        whole, low = report[name], report[f"{name}-low"]
        pipeline_alone = name.startswith("pipe") and processes == 2  # one replica of each stage: nothing to average
        if pipeline_alone:
            assert "bfloat16" not in low["reduced"]
        else:
            assert whole["reduced"].get("bfloat16", 0) == 0, name
            sent = whole["reduced"]["float32"] - low["reduced"].get("float32", 0)
            assert sent > 0.6 * whole["reduced"]["float32"], name  # what is left are gathered keys' gradients
            assert low["reduced"]["bfloat16"] == pytest.approx(sent / 2, rel=0.01), name
        first, other = whole["results"][0], low["results"][0]
        assert other.loss == pytest.approx(first.loss, rel=1e-6), name
        assert other.gradient_norm == pytest.approx(first.gradient_norm, rel=3e-3), name
        for step, (one, two) in enumerate(zip(whole["results"], low["results"], strict=True)):
            assert two.loss == pytest.approx(one.loss, rel=2e-3), f"{name}, step {step}"
        equal = [torch.equal(whole["weights"][key], weight) for key, weight in low["weights"].items()]
        assert all(equal) if pipeline_alone else not all(equal), name
        for key, weight in low["weights"].items():
            if weight.is_floating_point() and "queue" not in key:
                torch.testing.assert_close(weight, whole["weights"][key], rtol=0, atol=2e-3, msg=f"{name}: {key}")
