"""Blocks that are compiled after the first step, under every kind of host: nothing but rounding differs."""

from typing import Any

import pytest
import test_layouts as layouts
import torch

from engine.step.compiled import compile_blocks

pytestmark = pytest.mark.distributed

STEPS = 3


def trained(hosts: list[str], model_name: str) -> dict[str, dict[str, Any]]:
    """Worker: some steps of each host as it is, and compiled."""
    model, report = layouts.Model(model_name), {}
    for name in hosts:
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            host, results = layouts.make_host(name, model), []
            for step in range(STEPS):
                results.append(host.step(model.batches(step, host.gather), step))
                if compiled and step == 0:
                    compile_blocks(host.chain, backend="aot_eager")
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            report[f"{name}-{compiled}"] = {"results": results, "weights": host.full_weights(), "graphs": graphs}
    return report


@pytest.mark.full
def test_every_host_trains_compiled_blocks(run_distributed: Any) -> None:
    names = ["plain", "zero1", "zero3", "pipe2-zero1"]
    report = run_distributed(trained, processes=2, limit=400, hosts=names, model_name="real-limoe-spatial")[0]
    for name in names:
        usual, compiled = report[f"{name}-False"], report[f"{name}-True"]
        assert compiled["graphs"] > usual["graphs"] == 0, name
        for step, (one, two) in enumerate(zip(usual["results"], compiled["results"], strict=True)):
            assert two.loss == pytest.approx(one.loss, rel=1e-5), f"{name}, step {step}"
            assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4), f"{name}, step {step}"
        for key, weight in usual["weights"].items():
            torch.testing.assert_close(compiled["weights"][key], weight, rtol=0, atol=5e-5, msg=f"{name}: {key}")
