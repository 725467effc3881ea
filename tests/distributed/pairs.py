"""Small models of image-text pairs in every layout: what the tests of single architectures share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import real_chain as real
import torch
from test_layouts import ACCUMULATION, JOINED, TOLERANCES, Model, assert_equal_runs

from engine.hosts.pipeline.cut import layer_costs
from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures import Architecture
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.objectives import Objective

HOSTS = ("plain", "zero3", "zero3-built", "pipe2-zero1")

Report = dict[str, dict[str, Any]]


class PairModel(Model):
    """A small chain, and batches of pairs for it."""

    def __init__(self, config: Architecture, objectives: tuple[Objective, ...], frozen: Sequence[str] = ()) -> None:
        """Describes the model.

        Args:
            config: The architecture.
            objectives: What is trained.
            frozen: Patterns of parameters that are not.
        """
        self.config, self.objectives, self.frozen = config, objectives, frozen
        self.plan_layout = partial(plan_layout, objectives)

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = build_chain(self.config, self.objectives, real.TOKENS, gather=gather, settle=settle)
        freeze(chain, self.frozen, "stages.0.freeze")
        freeze_idle(chain, self.layouts())
        return chain

    def layouts(self) -> list[Any]:
        return [self.plan_layout("image_text", JOINED, 1)]

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Any]:
        return real.step_batches(step, ACCUMULATION, JOINED, gather, self.objectives, ("image_text",))


def check_hosts_agree(
    run_distributed: Any,
    worker: Callable[[list[str]], Report],
    losses: set[str],
    limit: int = 200,
    hosts: Sequence[str] = HOSTS,
) -> dict[str, Any]:
    """Runs each host on two processes, and compares losses, gradient norms and weights with one plain process.

    Args:
        run_distributed: The fixture.
        worker: Trains hosts; stands at the level of its module.
        losses: Names of the losses that there have to be.
        limit: Seconds for all of them.
        hosts: Which.

    Returns:
        What the one plain process reported.
    """
    expected = worker(["plain"])["plain"]
    assert expected["results"][0].losses.keys() == losses
    ranks = run_distributed(worker, processes=2, limit=limit, hosts=list(hosts))
    for name in hosts:
        assert_equal_runs(ranks[0][name], expected, TOLERANCES["real"])
        assert ranks[1][name]["results"] == ranks[0][name]["results"]
    return expected
