"""Quantizing pictures: loss, gradients, predicted codes, and what it refuses."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_clip import TOKENS
from transformers import AutoModel

from engine.hosts.plain import PlainHost
from engine.step.optimizer import OptimizerConfig
from omnivl.architectures import CLIP
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.sizes import InputSizes, PictureSizes
from omnivl.hub import OmniVLConfig, OmniVLModel
from omnivl.inference.predict import predict
from omnivl.objectives.quantize import Quantize, QuantizeHead
from omnivl.parts import attention
from omnivl.parts.quantize import LookupFree, VectorQuantizer

SIZES = HeadSizes(
    {"visual": 6}, text_length=6, vocab_size=30, projection_size=0, patch_size=4, tubelet_size=1, image_size=8
)
BY_GRADIENT = VectorQuantizer(num_codes=5, size=3, update="gradient")
OBJECTIVE = Quantize(quantizer=BY_GRADIENT, width=2)

MOVING = VectorQuantizer(num_codes=7, size=3, restart_after=2)
MODEL = replace(CLIP.presets["tiny"], vocab_size=50, text_length=8, image_size=16, patch_size=4, projection_size=1)


def chain_of(objective: Quantize, seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return build_chain(MODEL, (objective,), TOKENS)


def images(step: int = 0) -> Batch:
    random = torch.Generator().manual_seed(step)
    frames, own = torch.randint(0, 256, (3, 1, 3, 16, 16), generator=random, dtype=torch.uint8), torch.arange(3)
    return Batch("image", frames, None, own, own, own)


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


@pytest.mark.parametrize("quantizer", [BY_GRADIENT, MOVING, LookupFree(size=3)])
def test_operations_are_what_torch_counts(monkeypatch, quantizer) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    objective = replace(OBJECTIVE, quantizer=quantizer, width=3)
    chain, layout = chain_of(objective), plan_layout((objective,), "image", 3, 1)
    with FlopCounterMode(display=False) as counter:
        chain(State.from_batch(images(), layout))["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, layout), rel=1e-6)
    head = chain.losses.heads["quantize"]
    assert isinstance(head, QuantizeHead)
    assert chain.losses.flops(layout, None) == head.flops(layout, chain.losses.backward) > 0


def test_a_run_that_resumes_has_the_same_codebook_to_the_bit(tmp_path: Path) -> None:
    objective = replace(OBJECTIVE, quantizer=MOVING)

    def host(seed: int) -> PlainHost:
        optimizer = OptimizerConfig(lr=1e-2, schedule="constant")
        return PlainHost(chain_of(objective, seed), optimizer, partial(plan_layout, (objective,)), total_steps=8)

    def train(trained: PlainHost, steps: range) -> dict[str, torch.Tensor]:
        for step in steps:
            trained.step([images(step)], step)
        weights = trained.full_weights()
        assert weights is not None
        return {name: tensor.clone() for name, tensor in weights.items()}

    whole, first, second = host(0), host(0), host(1)
    before = train(first, range(4))
    first.save(tmp_path)
    second.load(tmp_path)
    wanted, got = train(whole, range(8)), train(second, range(4, 8))
    buffers = {f"losses.heads.quantize.quantizer.{name}" for name in ("codebook", "uses", "sums", "unused", "steps")}
    assert buffers <= wanted.keys()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert not any(torch.equal(wanted[name], before[name]) for name in buffers if not name.endswith("unused"))


@pytest.mark.parametrize("quantizer", [BY_GRADIENT, MOVING, LookupFree(size=3)])
def test_an_exported_model_gives_the_same_codes(tmp_path: Path, quantizer) -> None:
    objective = replace(OBJECTIVE, quantizer=quantizer, name="codes", weight=2.0)
    chain = chain_of(objective)
    layout = plan_layout((objective,), "image", 3, 1)
    chain(State.from_batch(images(), layout))["loss"].backward()
    chain.after_step()
    model = OmniVLModel(OmniVLConfig.of(MODEL, (objective,), TOKENS))
    model.chain.load_state_dict({name: chain.state_dict()[name] for name in model.chain.state_dict()})
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    frames = images(1).frames
    assert frames is not None
    with torch.no_grad():
        codes = predict(chain.eval(), "codes", frames)
        assert torch.equal(predict(loaded.chain, "codes", frames), codes)
    assert codes.shape == (3, 16)
    assert len(codes.unique()) > 1
