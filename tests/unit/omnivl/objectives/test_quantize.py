"""Quantizing pictures: loss, gradients, predicted codes, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.sizes import InputSizes, PictureSizes
from omnivl.objectives.quantize import Quantize, QuantizeHead
from omnivl.parts.quantize import LookupFree, VectorQuantizer

SIZES = HeadSizes({"visual": 6}, text_length=6, vocab_size=30, projection_size=0, patch_size=4, tubelet_size=1)
BY_GRADIENT = VectorQuantizer(num_codes=5, size=3, update="gradient")
OBJECTIVE = Quantize(quantizer=BY_GRADIENT, width=2)


def quantized(objective: Quantize) -> tuple[State, QuantizeHead]:
    torch.manual_seed(0)
    layout = plan_layout((objective,), "image", 2, 1)
    frames = torch.randint(0, 256, (2, 1, 3, 8, 8), dtype=torch.uint8)
    head = objective.build_head(SIZES)
    assert isinstance(head, QuantizeHead)
    return State({"frames": frames, "visual": torch.randn(2, 5, 6, requires_grad=True)}, layout), head


@pytest.mark.parametrize("quantizer", [BY_GRADIENT, LookupFree(size=3)])
def test_every_weight_and_every_patch_learns(quantizer) -> None:
    objective = replace(OBJECTIVE, quantizer=quantizer)
    state, head = quantized(objective)
    made = objective.loss(state, Heads(head), LocalGather())
    made.loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in head.parameters())
    gradient = state["visual"].grad
    assert gradient is not None
    assert not gradient[:, 0].any(), "the first position is no patch"
    assert gradient[:, 1:].any(-1).all()


def test_the_loss_is_the_error_of_pixels_and_the_quantizer_s_own() -> None:
    state, head = quantized(OBJECTIVE)
    made = OBJECTIVE.loss(state, Heads(head), LocalGather())
    vectors = head.inner(state["visual"][:, 1:])
    distances = torch.cdist(vectors.flatten(0, 1), head.quantizer.codebook)
    codes = distances.argmin(1)
    restored, _, _ = head(state["visual"][:, 1:], (8, 8), LocalGather())
    wanted = state["frames"][:, 0].float() / 255 * 2 - 1
    error = F.mse_loss(restored, wanted)
    own = 1.25 * distances.min(1).values.square().mean() / 3
    torch.testing.assert_close(made.loss, error + own)
    torch.testing.assert_close(made.metrics["reconstruction"], error)
    torch.testing.assert_close(made.metrics["used"], torch.tensor(len(codes.unique()) / 5))
    assert torch.equal(OBJECTIVE.predict(state, Heads(head)), codes.reshape(2, 4))


def test_codes_are_restored_where_their_patches_are() -> None:
    """Far enough from a patch, pixels do not change with it: only the norms' statistics carry it there."""
    objective = replace(OBJECTIVE, quantizer=LookupFree(size=3))
    _, head = quantized(objective)
    patches = torch.randn(1, 8, 6)
    other = patches.clone()
    other[0, 2] = -4.0 * other[0, 2]  # row 0 of two rows of four patches, third column
    with torch.no_grad():
        for norm in (*(one for block in head.blocks for one in (block.norm1, block.norm2)), head.norm):
            norm.forward = lambda x: x
        before, after = (head(each, (8, 16), LocalGather())[0] for each in (patches, other))
    changed = (before != after).any(1)[0]
    assert changed[:4, 8:12].all()
    assert not changed[:, 0].any()


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, []),
        ({"patch_size": 14}, ["'quantize' with patches of 14 pixels"]),
        ({"native": True}, ["'quantize' with sizes 'native'"]),
    ],
)
def test_sizes_that_it_cannot_restore_are_refused(options, got) -> None:
    sizes = {"image_size": 56, "video_size": 56, "patch_size": 8, "num_frames": 1, "tubelet_size": 1} | options
    assert [misfit.got for misfit in OBJECTIVE.misfits(InputSizes.of(PictureSizes(**sizes), 6), 4)] == got
