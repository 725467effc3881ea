"""One wiring, two hosts: losses, gradient norms and weights of plain and ZeRO 0-3 agree on any number of replicas.

The reference is one plain process that holds the joined batch. Steps change their kinds between and within steps, so that
layers and parts of layers go without gradient in some steps; gradients are accumulated and clipped.
"""

from typing import Any

import pytest
import synthetic_chain as synthetic
import torch

from engine.collectives import make_gather
from engine.hosts.base import Host
from engine.hosts.plain import PlainHost
from engine.hosts.zero import ZeroHost
from engine.optimizer import OptimizerConfig

STEPS, ACCUMULATION, JOINED = 6, 2, 8
CONFIG = OptimizerConfig(
    # eps is large enough that a gradient of pure rounding noise is not blown up to a full step.
    lr=1e-2,
    eps=1e-5,
    weight_decay=0.1,
    gradient_clipping=0.5,
    schedule="linear",
    warmup_steps=2,
    layer_decay=0.7,
)

pytestmark = pytest.mark.distributed


def make_host(name: str, seed: int = 0) -> Host:
    gather = make_gather()
    chain = synthetic.build_synthetic_chain(gather, seed=seed)
    if name == "plain":
        return PlainHost(
            chain, CONFIG, synthetic.plan_layout, total_steps=STEPS, gradient_accumulation_steps=ACCUMULATION
        )
    return ZeroHost(
        chain,
        CONFIG,
        synthetic.plan_layout,
        total_steps=STEPS,
        stage=int(name.removeprefix("zero")),  # type: ignore[arg-type]
        micro_batch_size=JOINED // gather.replicas,
        gradient_accumulation_steps=ACCUMULATION,
    )


def train_hosts(hosts: list[str]) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from the same weights."""
    report = {}
    for name in hosts:
        host = make_host(name)
        results = [
            host.step(synthetic.step_batches(step, ACCUMULATION, JOINED, host.gather), step) for step in range(STEPS)
        ]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


def reference() -> dict[str, Any]:
    return train_hosts(["plain"])["plain"]


def assert_equal_runs(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for step, (ours, theirs) in enumerate(zip(got["results"], expected["results"], strict=True)):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5), f"loss of step {step}"
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5), f"losses of step {step}"
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5), f"metrics of step {step}"
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-5), f"gradient norm of step {step}"
        assert ours.learning_rates == theirs.learning_rates
        assert not ours.skipped
    assert got["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(
            got["weights"][name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("processes", "hosts"),
    [(1, ["zero0", "zero1", "zero2", "zero3"]), (2, ["plain", "zero0", "zero1", "zero2", "zero3"]), (4, ["zero3"])],
    ids=["1", "2", "4"],
)
def test_hosts_agree(run_distributed: Any, processes: int, hosts: list[str]) -> None:
    expected = reference()
    ranks = run_distributed(train_hosts, processes=processes, hosts=hosts)
    for name in hosts:
        assert_equal_runs(ranks[0][name], expected)
        for other in ranks[1:]:
            assert other[name]["weights"] is None  # only replica 0 holds whole weights
            assert other[name]["results"] == ranks[0][name]["results"]
