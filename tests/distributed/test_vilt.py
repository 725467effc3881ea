"""ViLT in every layout: losses, gradient norms and weights agree with those of one plain process."""

from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import ViLT
from omnivl.objectives import ITM, MLM, Objective
from omnivl.parts.sizes import Transformer, Words

OBJECTIVES: tuple[Objective, ...] = (MLM(probability=0.5), ITM(negatives="global"))
CONFIG = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=3),
    words=Words(length=6, vocab_size=40),
    image_size=8,
    patch_size=4,
)


def train_vilt(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_vilt, {"mlm", "itm"})
