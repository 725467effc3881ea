"""SimVLM in every layout: losses, gradient norms and weights agree with those of one plain process."""

from dataclasses import replace
from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import SimVLM
from omnivl.chain.gather import Gather
from omnivl.objectives import Objective, SplitLM
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (SplitLM(),)
STACK = Transformer(hidden_size=16, num_heads=2, layers=2)
CONFIG = SimVLM(
    encoder=STACK,
    decoder=STACK,
    stem_width=4,
    stem_blocks=(1, 1, 1),
    **{"image_size": 32, "text_length": 6, "vocab_size": 40},
)


class Larger(PairModel):
    """The same with pictures of 32 pixels, of which the stem makes four tokens."""

    def batches(self, step: int, gather: Gather) -> list[Any]:
        """See ``PairModel``: each pixel four times, down and across."""
        made = super().batches(step, gather)
        return [
            replace(one, frames=one.frames.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)) for one in made
        ]


def train_simvlm(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(Larger(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_simvlm, {"split_lm"})
