"""Diffusion in every layout: losses, gradient norms, weights and the scale of latents agree with one plain process."""

from typing import Any

import pytest
from pairs import HOSTS, PairModel, Report, check_hosts_agree
from test_layouts import train

from omnivl.architectures import CLIP
from omnivl.objectives import Diffusion, Objective, Quantize
from omnivl.parts.denoiser import DenoiserSizes
from omnivl.parts.quantize import VectorQuantizer
from omnivl.parts.sizes import Transformer

SIZES = DenoiserSizes(hidden_size=16, num_heads=2, layers=3)
# The tokenizer is not trained, and its encoder is frozen; each part of the condition is in one of the two.
OBJECTIVES: tuple[Objective, ...] = (
    Diffusion(denoiser=SIZES, latents="quantize", latent_size=3, left_out=0.3),
    Diffusion(name="pixels", denoiser=SIZES, given="embedding", target="picture"),
    Quantize(width=2, quantizer=VectorQuantizer(num_codes=6, size=3), learns=False),
)
STACK = Transformer(hidden_size=16, num_heads=2, layers=2)
CONFIG = CLIP(
    vision=STACK,
    text=STACK,
    **{"image_size": 8, "patch_size": 4, "text_length": 6, "vocab_size": 40, "projection_size": 8},
)


def train_diffusion(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(PairModel(CONFIG, OBJECTIVES, frozen=("embed.block.visual", "visual_*")), hosts)


@pytest.mark.distributed
@pytest.mark.parametrize("hosts", [("zero3",), pytest.param(HOSTS, marks=pytest.mark.full)], ids=["zero3", "all"])
def test_hosts_agree(run_distributed: Any, hosts: tuple[str, ...]) -> None:
    check_hosts_agree(run_distributed, train_diffusion, {"diffusion", "pixels"}, hosts=hosts)
