"""METER in every layout: losses, gradient norms and weights agree with those of one plain process."""

from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import METER
from omnivl.objectives import ITM, MLM, Objective
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (MLM(probability=0.5), ITM(negatives="global", alignment_weight=0.0))
BERT = Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12)
CONFIG = METER(
    **{"vision": Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5), "text": BERT, "fusion": BERT},
    **{"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40},
)


def train_meter(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIG, OBJECTIVES), hosts)


@pytest.mark.full
@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_meter, {"mlm", "itm"})
