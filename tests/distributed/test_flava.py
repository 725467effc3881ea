"""FLAVA in every layout: losses, gradient norms and weights agree with those of one plain process."""

from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import FLAVA
from omnivl.objectives import ITC, MMM, Objective
from omnivl.objectives.codes import RandomCodebook
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (
    ITC(),
    MMM(probability=0.5, replaced=0.4, negatives="global", min_block=1, codebook=RandomCodebook(num_codes=12, width=3)),
)
STACK = Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-12)
CONFIG = FLAVA(
    **{"vision": STACK, "text": STACK, "fusion": STACK},
    **{"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8},
)


def train_flava(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_flava, {"itc", "mmm"}, limit=350)
