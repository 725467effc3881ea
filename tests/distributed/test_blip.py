"""BLIP in every layout: losses, gradient norms and weights, twins included, agree with those of one plain process."""

from typing import Any

import pytest
import torch
from pairs import HOSTS, PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import BLIP
from omnivl.objectives import LM, VLM, Objective, UniVLC
from omnivl.parts.sizes import MomentumConfig, Transformer

OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=21, batch_keys="momentum", soft_target_alpha=0.4),
    VLM(negatives="global"),
    LM(),
)
CONFIG = BLIP(
    vision=Transformer(hidden_size=24, num_heads=2, layers=2),
    text=Transformer(hidden_size=16, num_heads=2, layers=2, norm="post", norm_eps=1e-12),
    **{"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8},
    momentum=MomentumConfig(decay=0.5),
)


def train_blip(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("hosts", [("pipe2-zero1",), pytest.param(HOSTS, marks=pytest.mark.full)], ids=["pipe2", "all"])
def test_hosts_agree(run_distributed: Any, hosts: tuple[str, ...]) -> None:
    report = check_hosts_agree(run_distributed, train_blip, {"univlc", "vlm", "lm"}, limit=350, hosts=hosts)
    weights = report["weights"]
    twins = [name for name in weights if name.startswith("mixed_00.momentum_block.")]
    assert any(not torch.equal(weights[name], weights[name.replace("momentum_", "")]) for name in twins)
