"""BLIP-2 in every layout: losses, gradient norms and weights agree with those of one plain process."""

from functools import partial
from typing import Any

import pytest
import real_chain as real
import torch
from test_layouts import ACCUMULATION, JOINED, STEPS, TOLERANCES, Model, assert_equal_runs, make_host

from engine.hosts.pipeline.cut import layer_costs
from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures import BLIP2
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.objectives import ITC, LM, VLM, Objective
from omnivl.parts.sizes import Transformer, Words

OBJECTIVES: tuple[Objective, ...] = (ITC(label_smoothing=0.1), VLM(negatives="global"), LM())
CONFIG = BLIP2(
    vision=Transformer(hidden_size=24, num_heads=2, layers=2),
    qformer=Transformer(hidden_size=16, num_heads=2, layers=3, norm="post", norm_eps=1e-12),
    num_queries=3,
    words=Words(length=6, vocab_size=40),
    image_size=8,
    patch_size=4,
    projection_size=8,
)
FROZEN = ["embed.block.visual", "visual_[0-9]*"]


class Blip2Model(Model):
    """The tiny chain with its tower frozen, and batches of pairs for it."""

    def __init__(self) -> None:
        self.plan_layout = partial(plan_layout, OBJECTIVES)

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = build_chain(CONFIG, OBJECTIVES, real.TOKENS, gather=gather, settle=settle)
        freeze(chain, FROZEN, "stages.0.freeze")
        freeze_idle(chain, self.layouts())
        return chain

    def layouts(self) -> list[Any]:
        return [self.plan_layout("image_text", JOINED, 1)]

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Any]:
        return real.step_batches(step, ACCUMULATION, JOINED, gather, OBJECTIVES, ("image_text",))


def train_blip2(hosts: list[str]) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from the same weights."""
    report = {}
    for name in hosts:
        model = Blip2Model()
        host = make_host(name, model)
        results = [host.step(model.batches(step, host.gather), step) for step in range(STEPS)]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    hosts = ["plain", "zero3", "zero3-built", "pipe2-zero1"]
    expected = train_blip2(["plain"])["plain"]
    assert {"itc", "vlm", "lm"} == expected["results"][0].losses.keys()
    ranks = run_distributed(train_blip2, processes=2, timeout=200, hosts=hosts)
    for name in hosts:
        assert_equal_runs(ranks[0][name], expected, TOLERANCES["real"])
        assert ranks[1][name]["results"] == ranks[0][name]["results"]
