"""CoCa in every layout: losses, gradient norms and weights agree with those of one plain process."""

from dataclasses import replace
from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import CoCa
from omnivl.objectives import ITC, LM, Objective
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (ITC(), LM(weight=2.0, label_smoothing=0.0))
STACK = Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5)
CONFIG = CoCa(
    vision=replace(STACK, hidden_size=24),
    text=STACK,
    multimodal=STACK,
    caption_queries=3,
    pooler_heads=2,
    **{"image_size": 8, "num_frames": 1, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8},
)
CONFIGS = {"paper": CONFIG, "released": replace(CONFIG, pooling="joint", alternates=True, closing="released")}


def train_coca(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIGS["paper"], OBJECTIVES), hosts)


def train_released(hosts: list[str]) -> Report:
    """Worker: the same with open_clip's options."""
    return train(PairModel(CONFIGS["released"], OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.parametrize("worker", [train_coca, train_released])
def test_hosts_agree(run_distributed: Any, worker: Any) -> None:
    check_hosts_agree(run_distributed, worker, {"itc", "lm"})
