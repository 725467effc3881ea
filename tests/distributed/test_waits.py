"""A host waits for its device once in a step, whichever host it is: for what the step reports."""

from typing import Any

import pytest
import test_layouts as layouts
import torch

from benchmarks.waits import WaitCounter

pytestmark = pytest.mark.distributed

HOSTS = ["plain", *layouts.ZERO, "pipe2-zero0", "pipe2-zero1"]


def waited(hosts: list[str], model_name: str) -> dict[str, Any]:
    """Worker: places where each host waits in its fifth step, and what the votes of the step are."""
    report = {}
    for name in hosts:
        model = layouts.Model(model_name)
        host = layouts.make_host(name, model)
        steps = [model.batches(step, host.gather) for step in range(3)]
        host.step(steps[0], 0)
        host.step(steps[0], 1)  # each kind of micro-batch once more, now that its order of layers is known
        with host.whole_chain() as whole, torch.no_grad():
            whole.encode_visual(torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8))
        for step in (
            2,
            3,
        ):  # after an evaluation an order has to be learnt anew: in a step, and the beginning of the next
            host.step(steps[0], step)
        votes = {"first": host.gather.replica == 0, "nobody": False}
        with WaitCounter() as waits:
            result = host.step(steps[0], 4, lambda votes=votes: votes)
        report[name] = {"waits": dict(waits.found), "votes": sorted(result.votes)}
    return report


@pytest.mark.parametrize("model", ["plan-vlmo_tiny-language", "plan-beit3_tiny-masked"])
def test_once_in_a_step(run_distributed: Any, model: str) -> None:
    for rank in run_distributed(waited, processes=2, limit=200, hosts=HOSTS, model_name=model):
        for name in HOSTS:
            assert sum(rank[name]["waits"].values()) == 1, (name, rank[name]["waits"])
            assert rank[name]["votes"] == ["first"], name
