"""Quantizing in every layout: losses, gradient norms, weights and codebooks agree with those of one plain process."""

from typing import Any

import pytest
import torch
from pairs import HOSTS, PairModel, Report, check_hosts_agree
from test_layouts import train

from engine.processes.collectives import make_gather
from omnivl.architectures import CLIP
from omnivl.chain.gather import Gather, LocalGather
from omnivl.objectives import Objective, Quantize
from omnivl.parts.quantize import LookupFree, VectorQuantizer
from omnivl.parts.sizes import Transformer

# No starts and restarts from vectors: which of them a code takes follows from their order, which the layout changes. No
# entropy: that of a mean over vectors is not the mean of micro-batches' entropies.
OBJECTIVES: tuple[Objective, ...] = (
    Quantize(width=2, quantizer=VectorQuantizer(num_codes=6, size=3, decay=0.5, restart_after=0)),
    Quantize(name="weights", width=2, quantizer=VectorQuantizer(num_codes=6, size=3, update="gradient")),
    Quantize(name="signs", width=2, quantizer=LookupFree(size=4, entropy=0.0)),
)
STACK = Transformer(hidden_size=16, num_heads=2, layers=2)
CONFIG = CLIP(
    vision=STACK,
    text=STACK,
    **{"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8},
)


def train_quantize(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.parametrize("hosts", [("plain",), pytest.param(HOSTS, marks=pytest.mark.full)], ids=["plain", "all"])
def test_hosts_agree(run_distributed: Any, hosts: tuple[str, ...]) -> None:
    check_hosts_agree(run_distributed, train_quantize, {"quantize", "weights", "signs"}, hosts=hosts)


def restart(gather: Gather) -> dict[str, torch.Tensor]:
    """Worker: starts, moves and restarts the codes of one quantizer by this replica's share of vectors."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes=8, size=3, restart_after=1).build()
    for step in range(4):
        vectors = torch.randn(12, 3, generator=torch.Generator().manual_seed(step))
        quantizer(vectors.chunk(gather.replicas)[gather.replica], gather)
        quantizer.after_step(gather)
    return dict(quantizer.state_dict())


def restart_here() -> dict[str, torch.Tensor]:
    """Worker: among the replicas that there are."""
    return restart(make_gather(None))


@pytest.mark.distributed
def test_replicas_start_and_restart_codes_alike(run_distributed: Any) -> None:
    expected = restart(LocalGather())
    for state in run_distributed(restart_here, processes=2):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
