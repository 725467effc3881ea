"""BLIP-2 in every layout: losses, gradient norms and weights agree with those of one plain process."""

from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import BLIP2
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


def train_blip2(hosts: list[str]) -> Report:
    """Worker: trains each host in turn, the visual tower frozen."""
    return train(PairModel(CONFIG, OBJECTIVES, FROZEN), hosts)


@pytest.mark.distributed
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_blip2, {"itc", "vlm", "lm"})
