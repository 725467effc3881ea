"""Every test of this folder runs on a CUDA device, where there is one, and on the CPU, which keeps the test working."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.hosts.plain import PlainHost
from engine.step.optimizer import OptimizerConfig
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MCM, MFM, MLM, MRM, VLM, Objective, PrepareContext, UniVLC
from omnivl.parts.sizes import MomentumConfig

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=64, num_reserved=5)
# Head size 16 and 17 to 65 positions: large enough for the fused kernels of a GPU, small enough for a CPU.
MODEL = OmniVL(
    **{"hidden_size": 32, "num_heads": 2, "vision_layers": 2, "text_layers": 2, "projection_size": 16},
    **{"alignment_layers": 1, "generation_layers": 1, "image_size": 32, "video_size": 32, "patch_size": 8},
    **{"num_frames": 4, "text_length": 12, "vocab_size": 64, "momentum": MomentumConfig(decay=0.5)},
)
OBJECTIVES: tuple[Objective, ...] = (
    *(MLM(), MRM(targets="momentum"), MFM(), MCM(), UniVLC(queue_size=16), VLM(include_labels=True), LM()),
)
SIZE = 6
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4, schedule="constant", gradient_clipping=1.0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def batch_of(kind: DataKind, step: int, objectives: Sequence[Objective] = OBJECTIVES) -> Batch:
    """A batch of noise on the CPU; texts differ in length, two samples share an identity."""
    random = torch.Generator().manual_seed(step)
    times = MODEL.num_frames if is_video(kind) else 1
    frames = torch.randint(0, 256, (SIZE, times, 3, 32, 32), dtype=torch.uint8, generator=random)
    token_ids = torch.randint(TOKENS.num_reserved, 64, (SIZE, MODEL.text_length), generator=random)
    token_ids[:, 0] = TOKENS.cls
    for row in range(SIZE):
        token_ids[row, 4 + row] = TOKENS.sep
        token_ids[row, 5 + row :] = TOKENS.pad
    identity, position = torch.tensor([0, 1, 2, 0, 3, 4]), torch.arange(SIZE) + SIZE * step
    batch = Batch(kind, frames, token_ids, identity, torch.full((SIZE,), -1), position)
    context = PrepareContext(0, "test", TOKENS, MODEL.inputs.grid(is_video(kind)), step)
    prepared: dict[str, torch.Tensor] = {}
    for objective in objectives:
        if objective.demands(kind, batch.size) is not None:
            prepared |= objective.prepare(batch, context)
    return replace(batch, prepared=prepared)


def chain_of(dtype: torch.dtype, objectives: Sequence[Objective] = OBJECTIVES) -> Chain:
    """The same weights for each dtype, away from the start, where all embeddings are alike."""
    torch.manual_seed(0)
    chain = build_chain(MODEL, objectives, TOKENS, compute_dtype=dtype)
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if parameter.requires_grad and "logit_scale" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    chain.copy_to_twins()
    return chain


def host_of(dtype: torch.dtype, device: torch.device, objectives: Sequence[Objective] = OBJECTIVES) -> PlainHost:
    chain = chain_of(dtype, objectives)
    return PlainHost(chain, OPTIMIZER, partial(plan_layout, objectives), total_steps=10, device=device)


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """Length of the difference of two sets of tensors over the length of the second."""
    assert found.keys() == wanted.keys()
    off = sum(float((found[name].double().cpu() - wanted[name].double().cpu()).square().sum()) for name in wanted)
    whole = sum(float(wanted[name].double().square().sum()) for name in wanted)
    return math.sqrt(off / whole)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    return batch_of


@pytest.fixture
def make_chain() -> Callable[..., Chain]:
    return chain_of


@pytest.fixture
def make_host() -> Callable[..., PlainHost]:
    return host_of


@pytest.fixture
def relative_distance() -> Callable[..., float]:
    return distance
