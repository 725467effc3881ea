"""Quantizing in every layout: losses, gradient norms, weights and codebooks agree with those of one plain process."""

from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import CLIP
from omnivl.objectives import Objective, Quantize
from omnivl.parts.quantize import LookupFree, VectorQuantizer
from omnivl.parts.sizes import Transformer

# No restarts: which vector a code takes the place of follows from their order. No entropy: that of a mean over vectors
# is not the mean of micro-batches' entropies.
OBJECTIVES: tuple[Objective, ...] = (
    Quantize(width=2, quantizer=VectorQuantizer(num_codes=6, size=3, decay=0.5, restart_below=0.0)),
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
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_quantize, {"quantize", "weights", "signs"})
