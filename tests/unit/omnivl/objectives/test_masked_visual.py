from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.errors import UserError
from omnivl.objectives import MCM, MFM, MRM
from omnivl.objectives.masked_visual import (
    PatchHead,
    feature_distance,
    feature_targets,
    patchify,
    pixel_targets,
    prepared_mask,
)

SIZES = HeadSizes(
    {"visual": 4}, text_length=4, vocab_size=5, projection_size=4, patch_size=2, tubelet_size=2, image_size=4
)


def identity_head(outputs: int, tubelet_size: int = 1) -> PatchHead:
    """Puts the features out as they are."""
    head = PatchHead(outputs, outputs, patch_size=1, tubelet_size=tubelet_size)
    torch.nn.init.eye_(head.output.weight)
    return head


def test_patchify_goes_row_by_row() -> None:
    # One channel of a 4 x 4 frame counts 0 .. 15; patches of 2 x 2: {0, 1, 4, 5}, {2, 3, 6, 7}, {8, ...}, {10, ...}.
    frame = torch.arange(16).reshape(1, 1, 1, 4, 4).repeat(1, 1, 3, 1, 1)
    patches = patchify(frame, 2)
    assert patches.shape == (1, 1, 4, 12)
    assert patches[0, 0, :, :4].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_patchify_joins_the_frames_of_a_tubelet() -> None:
    frames = torch.arange(4).reshape(1, 4, 1, 1, 1).repeat(1, 1, 3, 2, 2)  # frame f has the value f everywhere
    patches = patchify(frames, 2, tubelet_size=2)
    assert patches.shape == (1, 2, 1, 24)
    assert patches[0, 0, 0].tolist() == [0] * 12 + [1] * 12
    assert patches[0, 1, 0].tolist() == [2] * 12 + [3] * 12


def test_pixel_targets_have_mean_0_and_variance_1() -> None:
    # A patch of one pixel with colours 0, 51, 102, in parts of 255: 0, 0.2, 0.4. Mean 0.2, unbiased variance
    # (0.04 + 0 + 0.04) / 2 = 0.04, deviation 0.2 (eps 1e-6 is below the tolerance): -1, 0, 1.
    frames = torch.tensor([0, 51, 102], dtype=torch.uint8).reshape(1, 1, 3, 1, 1)
    targets = pixel_targets(frames, torch.tensor([0]), 1)
    torch.testing.assert_close(targets, torch.tensor([[-1.0, 0.0, 1.0]]), atol=1e-4, rtol=0)


def test_flat_patches_have_zero_targets() -> None:
    frames = torch.full((1, 1, 3, 2, 2), 200, dtype=torch.uint8)
    targets = pixel_targets(frames, torch.tensor([0]), 2)
    assert targets.abs().max() < 1e-3


def test_feature_targets_are_normalised_features_of_masked_patches() -> None:
    # Position 0 is the class token. Patch 1 of row 0 is masked: features 1, 3 -> mean 2, deviation 1 -> -1, 1.
    features = torch.tensor([[[9.0, 9.0], [5.0, 7.0], [1.0, 3.0]]], requires_grad=True)
    targets = feature_targets(features, torch.tensor([1]))
    torch.testing.assert_close(targets, torch.tensor([[-1.0, 1.0]]), atol=1e-4, rtol=0)
    assert not targets.requires_grad


def test_feature_distance_by_hand() -> None:
    predicted, targets = torch.tensor([[0.5, 3.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    # Smooth L1: 0.5 * 0.5^2 = 0.125 and 2 - 0.5 = 1.5, mean 0.8125; then 0.5 and 0.5, mean 0.5.
    assert feature_distance(predicted, targets, "smooth_l1").tolist() == [0.8125, 0.5]
    # Cosine: (0 + 3) / sqrt(9.25) = 0.98639; (12 + 12) / 25 = 0.96.
    torch.testing.assert_close(
        feature_distance(predicted, targets, "cosine"), torch.tensor([1 - 0.986394, 0.04]), atol=1e-5, rtol=0
    )


def image_state(features: Tensor) -> State:
    """Two images of two one-pixel patches; only the second gets a masked pass, with its second patch masked."""
    frames = torch.zeros(2, 1, 3, 1, 2, dtype=torch.uint8)
    frames[1, 0, :, 0, 1] = torch.tensor([0, 51, 102])
    tensors = {
        "frames": frames,
        **prepared_mask("mrm", torch.tensor([1]), torch.tensor([[[False, True]]])),
        "visual/mrm": features,
    }
    return State(tensors, StepLayout("image_text", 2, 1))


def test_pixel_loss_and_gradient_by_hand() -> None:
    # Prediction (0, 0, 0) against (-1, 0, 1): mean square (1 + 0 + 1) / 3 = 0.6667.
    # Gradient 2 (p - t) / 3 = (2/3, 0, -2/3) at the masked patch, nothing elsewhere.
    features = torch.zeros(1, 3, 3, requires_grad=True)
    out = MRM().loss(image_state(features), Heads(identity_head(3)), LocalGather())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2 / 3, abs=1e-4)
    assert out.metrics["masked_fraction"].item() == 0.5
    wanted = torch.zeros(1, 3, 3)
    wanted[0, 2] = torch.tensor([2 / 3, 0.0, -2 / 3])
    torch.testing.assert_close(features.grad, wanted, atol=1e-4, rtol=0)


def test_momentum_loss_and_gradient_by_hand() -> None:
    # Sample 1's masked patch: momentum features (1, 3) -> targets (-1, 1); prediction (0.5, 0).
    # Smooth L1: 1.5 - 0.5 = 1 and 0.5 * 1 = 0.5, mean 0.75. Gradient: sign 1 / 2 and -1 / 2.
    features = torch.zeros(1, 3, 2)
    features[0, 2, 0] = 0.5
    features.requires_grad_(True)
    momentum = torch.tensor([[[8.0, 8.0]] * 3, [[9.0, 9.0], [5.0, 7.0], [1.0, 3.0]]])
    state = image_state(features).merged({"momentum_visual": momentum})
    out = MRM(targets="momentum").loss(state, Heads(identity_head(2)), LocalGather())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.75, abs=1e-4)
    assert features.grad is not None
    torch.testing.assert_close(features.grad[0, 2], torch.tensor([0.5, -0.5]), atol=1e-4, rtol=0)
    assert features.grad[0, :2].abs().sum() == 0


def test_clip_loss_takes_tubelets() -> None:
    # Four frames of one pixel make two tubelets of 6 values; the second tubelet holds 0, 1, 2 | 0, 1, 2 (times 51).
    # Mean 0.2, unbiased variance 4 * 0.04 / 5 = 0.032, so targets +-0.2 / 0.178885 = +-1.118; mean square of them
    # against zeros: 4 * 1.25 / 6 = 0.8333.
    frames = torch.zeros(1, 4, 3, 1, 1, dtype=torch.uint8)
    frames[0, 2:, :, 0, 0] = torch.tensor([0, 51, 102], dtype=torch.uint8)
    tensors = {
        "frames": frames,
        **prepared_mask("mfm", torch.tensor([0]), torch.tensor([[[False], [True]]])),
        "visual/mfm": torch.zeros(1, 3, 6),
    }
    heads = Heads(identity_head(6, tubelet_size=2))
    out = MFM().loss(State(tensors, StepLayout("video_text", 1, 4)), heads, LocalGather())
    assert out.loss.item() == pytest.approx(5 / 6, abs=1e-4)


def test_losses_are_fp32_under_bf16_streams() -> None:
    out = MRM().loss(image_state(torch.zeros(1, 3, 3, dtype=torch.bfloat16)), Heads(identity_head(3)), LocalGather())
    assert out.loss.dtype == torch.float32


def test_heads_fit_their_targets() -> None:
    def outputs(objective: MRM | MFM) -> int:
        head = objective.build_head(SIZES)
        assert isinstance(head, PatchHead)
        return head.output.out_features

    assert outputs(MRM()) == 2 * 2 * 3  # images are cut into 2D patches
    assert outputs(MFM()) == 2 * 2 * 3 * 2  # clips into tubelets of two frames
    assert outputs(MFM(targets="momentum")) == 4


def test_every_chooses_rows(make_batch, context) -> None:
    objective = MRM(every=2, offset=1)
    batch = make_batch(positions=(10, 11, 12, 13, 14))
    demands = objective.demands("image_text", batch.size)
    assert demands is not None
    assert demands.rows == {"visual": {"mrm": 2}}
    prepared = objective.prepare(batch, context)
    assert prepared["mrm/rows"].tolist() == [1, 3]
    assert prepared["mrm/mask"].shape == (2, 1, 16)
    whole = MRM().prepare(batch, context)
    assert torch.equal(prepared["mrm/mask"], whole["mrm/mask"][[1, 3]])
    assert MRM(every=4, offset=3).demands("image_text", 2) is None


@pytest.mark.parametrize("objective", [MRM(), MFM(), MCM()])
def test_masks_belong_to_the_sample_not_to_the_batch(objective, make_batch, context) -> None:
    kind = "video_text" if objective.on_videos else "image_text"
    name = f"{objective.key}/mask"
    joined = objective.prepare(make_batch(kind, positions=(4, 5, 6, 7)), context)[name]
    split = [objective.prepare(make_batch(kind, positions=p), context)[name] for p in ((4, 5), (6, 7))]
    assert torch.equal(joined, torch.cat(split))
    other_seed = objective.prepare(make_batch(kind, positions=tuple(range(20))), replace(context, seed=8))[name]
    assert not torch.equal(objective.prepare(make_batch(kind, positions=tuple(range(20))), context)[name], other_seed)


@pytest.mark.parametrize("objective", [MFM(), MCM()])
def test_whole_frames_are_masked(objective, make_batch, context) -> None:
    mask = objective.prepare(make_batch("video_text", positions=tuple(range(30))), context)[f"{objective.key}/mask"]
    assert mask.shape == (30, 8, 16)
    assert torch.equal(mask.any(-1), mask.all(-1))
    frames = mask.all(-1)
    assert frames.any(1).all()
    assert not frames.all(1).any()


def test_masks_are_per_tubelet(make_batch, context) -> None:
    mask = MFM().prepare(make_batch("video_text"), replace(context, tubelet_size=2))["mfm/mask"]
    assert mask.shape == (3, 4, 16)


@pytest.mark.parametrize("objective", [MFM(), MCM()])
def test_a_clip_of_one_tubelet_is_refused(objective, make_batch, context) -> None:
    with pytest.raises(UserError) as caught:
        objective.prepare(make_batch("video_text", num_frames=2), replace(context, tubelet_size=2))
    assert str(caught.value) == (
        f"objective {objective.key}: needs clips of at least 2 temporal positions, got 1; "
        "raise num_frames or lower tubelet_size"
    )


def test_momentum_targets_demand_the_twins() -> None:
    for targets in ("pixels", "momentum"):
        objective = MFM(targets=targets)
        demands = objective.demands("video_label", 3)
        assert demands is not None
        assert demands.twins == objective.twins == ({"visual"} if targets == "momentum" else set())
