"""ALBEF in every layout: losses, gradient norms and weights, twins included, agree with those of one plain process."""

from functools import partial
from typing import Any

import pytest
import real_chain as real
import torch
from test_layouts import ACCUMULATION, JOINED, STEPS, TOLERANCES, Model, assert_equal_runs, make_host

from engine.hosts.pipeline.cut import layer_costs
from engine.step.freeze import freeze_idle
from omnivl.architectures import ALBEF
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.objectives import MLM, VLM, Objective, UniVLC
from omnivl.parts.sizes import MomentumConfig, Transformer

OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=21, batch_keys="momentum", soft_target_alpha=0.4),
    VLM(negatives="global"),
    MLM(probability=0.5, soft_target_alpha=0.4, soft_target_warmup_steps=3),
)
BERT = Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12)
CONFIG = ALBEF(
    **{"vision": Transformer(hidden_size=24, num_heads=2, layers=2), "text": BERT, "fusion": BERT},
    **{"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8},
    momentum=MomentumConfig(decay=0.5),
)


class AlbefModel(Model):
    """The tiny chain, and batches of pairs for it."""

    def __init__(self) -> None:
        self.plan_layout = partial(plan_layout, OBJECTIVES)

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = build_chain(CONFIG, OBJECTIVES, real.TOKENS, gather=gather, settle=settle)
        freeze_idle(chain, self.layouts())
        return chain

    def layouts(self) -> list[Any]:
        return [self.plan_layout("image_text", JOINED, 1)]

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Any]:
        return real.step_batches(step, ACCUMULATION, JOINED, gather, OBJECTIVES, ("image_text",))


def train_albef(hosts: list[str]) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from the same weights."""
    report = {}
    for name in hosts:
        model = AlbefModel()
        host = make_host(name, model)
        results = [host.step(model.batches(step, host.gather), step) for step in range(STEPS)]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_hosts_agree(run_distributed: Any) -> None:
    hosts = ["plain", "zero3", "zero3-built", "pipe2-zero1"]
    expected = train_albef(["plain"])["plain"]
    assert {"univlc", "vlm", "mlm"} == expected["results"][0].losses.keys()
    twins = [name for name in expected["weights"] if name.startswith("alignment_00.momentum_block.")]
    assert twins
    assert any(
        not torch.equal(expected["weights"][name], expected["weights"][name.replace("momentum_", "")]) for name in twins
    )
    ranks = run_distributed(train_albef, processes=2, timeout=350, hosts=hosts)
    for name in hosts:
        assert_equal_runs(ranks[0][name], expected, TOLERANCES["real"])
        assert ranks[1][name]["results"] == ranks[0][name]["results"]
