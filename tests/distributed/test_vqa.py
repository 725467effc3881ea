"""Question answering in every layout: losses, gradient norms and weights agree with those of one plain process."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import real_chain as real
import torch
from test_layouts import ACCUMULATION, JOINED, STEPS, TOLERANCES, Model, assert_equal_runs, make_host

from engine.hosts.pipeline.cut import layer_costs
from engine.step.freeze import freeze_idle
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.data.collate import Collator
from omnivl.objectives import VQA, Answer, Objective

OBJECTIVES: tuple[Objective, ...] = (VQA(answers=("a", "bc", "d", "efg")), Answer(most=3, length=5))


class AskingModel(Model):
    """The tiny chain with a decoder, and batches of questions for it."""

    def __init__(self) -> None:
        self.plan_layout = partial(plan_layout, OBJECTIVES)

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = build_chain(real.CONFIG, OBJECTIVES, real.TOKENS, gather=gather, settle=settle)
        freeze_idle(chain, self.layouts())
        return chain

    def layouts(self) -> list[Any]:
        return [self.plan_layout("image_text", JOINED, 1)]

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Any]:
        """The replica's micro-batches; replicas have different numbers of answers, of which some are in the list."""
        own = JOINED // gather.replicas
        share = slice(gather.replica * own, (gather.replica + 1) * own)
        collator = Collator(
            real.CONFIG.inputs, real.LetterTokenizer(), Preparation(OBJECTIVES, real.TOKENS, real.CONFIG.inputs, seed=0)
        )
        types = asked_fields(OBJECTIVES, "image_text", "letters")
        batches = []
        for index in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            random = np.random.default_rng([7, index])
            examples = [
                replace(
                    one,
                    fields={
                        "answers": tuple(random.choice(["a", "bc", "d", "efg", "h", "hi"], 1 + row, replace=True)),
                        "weights": None,
                    },
                )
                for row, one in enumerate(real.examples(index, JOINED, video=False))
            ]
            batches.append(collator.collate(examples[share], "image_text", "letters", step, types))
        return batches


def train_asking(hosts: list[str]) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from the same weights."""
    report = {}
    for name in hosts:
        model = AskingModel()
        host = make_host(name, model)
        results = [host.step(model.batches(step, host.gather), step) for step in range(STEPS)]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    hosts = ["plain", "zero3", "zero3-built", "pipe2-zero1"]
    expected = train_asking(["plain"])["plain"]
    assert {"vqa", "answer"} == expected["results"][0].losses.keys()
    ranks = run_distributed(train_asking, processes=2, timeout=200, hosts=hosts)
    for name in hosts:
        assert_equal_runs(ranks[0][name], expected, TOLERANCES["real"])
        assert ranks[1][name]["results"] == ranks[0][name]["results"]
