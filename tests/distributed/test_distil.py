"""Distillation in every layout: the teacher lies beside the chain, and losses and weights agree with one process."""

from typing import Any

import pytest
import real_chain as real
import torch
from pairs import HOSTS, PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import CLIP
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.objectives import ITC, Distil, Objective
from omnivl.objectives.teacher import TaughtHead, Teacher
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (ITC(), Distil(teacher="runs/teacher", features={"visual": 24, "text": 24}))
SIZES: dict[str, int] = {"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8}


def config(width: int) -> CLIP:
    stack = Transformer(hidden_size=width, num_heads=2, layers=2)
    return CLIP(vision=stack, text=stack, **SIZES)  # type: ignore[arg-type]


class TaughtModel(PairModel):
    """A student, with a wider teacher beside it."""

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        chain = super().build(gather, settle, seed)
        torch.manual_seed(1)
        teacher = Teacher(build_chain(config(24), (ITC(),), real.TOKENS))
        head = chain.program[-1].get_submodule("heads.distil")
        assert isinstance(head, TaughtHead)
        head.teacher = teacher
        return chain


def train_taught(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(TaughtModel(config(16), OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.parametrize("hosts", [("plain", "pipe2-zero1"), pytest.param(HOSTS, marks=pytest.mark.full)])
def test_hosts_agree(run_distributed: Any, hosts: tuple[str, ...]) -> None:
    expected = check_hosts_agree(run_distributed, train_taught, {"itc", "distil"}, hosts=hosts)
    assert all(result.losses["distil"] > 1e-3 for result in expected["results"])
