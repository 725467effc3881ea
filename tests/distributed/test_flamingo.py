"""Flamingo and Frozen in every layout: losses, gradient norms and weights agree with those of one plain process."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import real_chain as real
import torch
from pairs import Report, check_hosts_agree
from small_flamingo import FLAMINGO, FROZEN, KEPT
from small_language import TOKENS, LetterTokenizer
from test_layouts import ACCUMULATION, JOINED, Model, train

from engine.hosts.pipeline.cut import layer_costs
from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import Batch
from omnivl.data.collate import Collator
from omnivl.data.tokenizer import load_readers
from omnivl.objectives import InterleavedLM, PrefixLM

CONFIGS: dict[str, Any] = {
    "flamingo": (FLAMINGO, InterleavedLM(), KEPT, "images_text"),
    "frozen": (FROZEN, PrefixLM(), ["language_*"], "image_text"),
}


class Documents(Model):
    """The small chains: documents of two pictures for one, captions for the other."""

    def __init__(self, name: str) -> None:
        self.config, objective, self.frozen, self.kind = CONFIGS[name]
        self.objectives = (objective,)
        self.plan_layout = partial(plan_layout, self.objectives)

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = build_chain(self.config, self.objectives, TOKENS, gather=gather, settle=settle)
        freeze(chain, self.frozen, "stages.0.freeze")
        freeze_idle(chain, self.layouts())
        return chain

    def layouts(self) -> list[Any]:
        return [self.plan_layout(self.kind, JOINED, 2 if self.kind == "images_text" else 1)]

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Batch]:
        own = JOINED // gather.replicas
        share = slice(gather.replica * own, (gather.replica + 1) * own)
        readers = load_readers(self.config.text_inputs, LetterTokenizer())
        prepare = Preparation(self.objectives, TOKENS, self.config.inputs, 0, readers)
        collator = Collator(self.config.inputs, LetterTokenizer(), prepare)
        found = []
        for index in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            examples = real.examples(index, JOINED, video=False)
            if self.kind == "images_text":
                before = [*examples[1:], examples[0]]
                examples = [
                    replace(
                        one,
                        text=f"<image>{other.text[:4]}<EOC><image>{one.text[: 1 + place % 5]}<EOC>",
                        pictures=torch.cat([torch.from_numpy(each.pictures) for each in (other, one)]).numpy(),
                    )
                    for place, (one, other) in enumerate(zip(examples, before, strict=True))
                ]
            found.append(collator.collate(examples[share], self.kind, "letters", step))
        return found


def train_flamingo(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(Documents("flamingo"), hosts)


def train_frozen(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(Documents("frozen"), hosts)


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_flamingo, {"interleaved_lm"})


@pytest.mark.distributed
@pytest.mark.full
def test_hosts_agree_on_frozen(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_frozen, {"prefix_lm"})
