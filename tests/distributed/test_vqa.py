"""Question answering in every layout: losses, gradient norms and weights agree with those of one plain process."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import real_chain as real
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import ACCUMULATION, JOINED, train

from omnivl.chain.gather import Gather
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.data.collate import Collator
from omnivl.objectives import VQA, Answer, Objective

OBJECTIVES: tuple[Objective, ...] = (VQA(answers=("a", "bc", "d", "efg")), Answer(most=3, length=5))


class AskingModel(PairModel):
    """The tiny chain with a decoder, and batches of questions for it."""

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


def train_asking(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(AskingModel(real.CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_asking, {"vqa", "answer"})
