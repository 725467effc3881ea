"""ALIGN in every layout: losses, gradient norms, weights and running statistics agree with those of one process."""

from dataclasses import replace
from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import ALIGN
from omnivl.objectives import ITC, Objective
from omnivl.parts.efficientnet import EfficientNet
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (ITC(temperature=0.5, label_smoothing=0.1),)
CONFIG = ALIGN(
    vision=EfficientNet(width=0.25, depth=0.5, drop_path=0.0, norm_eps=1e-2, statistics="global"),
    text=Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12),
    **{"image_size": 32, "text_length": 6, "vocab_size": 40},
)


class Enlarged(PairModel):
    """Images of the size that the model reads."""

    def batches(self, step: int, gather: Any) -> list[Any]:
        return [
            replace(batch, frames=batch.frames.repeat_interleave(4, -1).repeat_interleave(4, -2))
            for batch in super().batches(step, gather)
        ]


def train_align(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(Enlarged(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_hosts_agree(run_distributed: Any) -> None:
    weights = check_hosts_agree(run_distributed, train_align, {"itc"}, limit=350)["weights"]
    assert any(name.endswith(".variance") for name in weights)
