"""The visual encoder: images and clips, masked passes, drop path."""

from dataclasses import replace

import pytest
import torch

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.state import State, StepLayout
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.parts.drop_path import drop_path, drop_path_rates
from omnivl.parts.embed import numbered, resize_positions, resize_times, unfold
from omnivl.parts.padding import Padding

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=50, num_reserved=5)
CONFIG = replace(
    OmniVL.presets["tiny"],
    hidden_size=32,
    num_heads=2,
    vision_layers=3,
    text_layers=1,
    alignment_layers=1,
    generation_layers=1,
    image_size=32,
    video_size=32,
    num_frames=4,
    vocab_size=50,
)


def make(config=CONFIG, dtype=torch.float32):
    """A chain whose weights are all away from zero, but for what has to start there."""
    torch.manual_seed(0)
    chain = build_chain(config, (), TOKENS, compute_dtype=dtype)
    zero = ("temporal_fc", "video_delta", "times")
    for name, parameter in chain.named_parameters():
        if not any(part in name for part in zero):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return chain


def visual_rows(chain, frames, kind, masked=None, clean=True):
    batch, times = frames.shape[:2]
    segments = {"clean": slice(0, batch)} if clean else {}
    state = {"frames": frames}
    if masked is not None:
        rows, mask = masked
        start = batch if clean else 0
        segments["mrm"] = slice(start, start + len(rows))
        state |= {"mrm/rows": rows, "mrm/mask": mask}
    layout = StepLayout(kind, batch, times, visual=segments)
    out = State(state, layout)
    for layer in chain.layers[: 2 + CONFIG.vision_layers]:
        out = layer(out)
    return out["visual"]


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("times", [2, 4, 6])
def test_equal_frames_give_exactly_the_image(tubelet, times):
    chain = make(replace(CONFIG, tubelet_size=tubelet))
    image = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    still = visual_rows(chain, image, "image_text")
    clip = visual_rows(chain, image.expand(3, times, 3, 32, 32), "video_text")
    assert clip.shape == (3, 1 + times // tubelet * 16, 32)
    assert torch.equal(clip[:, 0], still[:, 0])
    for frame in clip[:, 1:].unflatten(1, (-1, 16)).unbind(1):
        assert torch.equal(frame, still[:, 1:])


def test_an_image_label_clip_of_three_equal_frames_is_exact_too():
    # 3 x / 3 need not be x in floating point: the mean over class tokens is taken around its first term.
    chain = make(replace(CONFIG, num_frames=3))
    image = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    still = visual_rows(chain, image, "image_text")
    clip = visual_rows(chain, image.expand(2, 3, 3, 32, 32), "video_label")
    assert torch.equal(clip[:, 0], still[:, 0])


def test_frames_talk_once_the_temporal_projection_has_moved():
    chain = make()
    clip = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    order = clip[:, [1, 0, 2, 3]]
    before = visual_rows(chain, clip, "video_text")[:, 1:].unflatten(1, (4, 16))
    swapped = visual_rows(chain, order, "video_text")[:, 1:].unflatten(1, (4, 16))
    torch.testing.assert_close(
        swapped[:, 2:], before[:, 2:]
    )  # without it, a frame changes others through the class only
    torch.nn.init.normal_(chain.embed.block.visual.times)
    for index in range(CONFIG.vision_layers):
        torch.nn.init.normal_(chain.get_submodule(f"visual_{index:02d}").block.temporal.temporal_fc.weight)
    after = visual_rows(chain, clip, "video_text")
    swapped = visual_rows(chain, order, "video_text")
    assert not torch.allclose(after[:, 33:], swapped[:, 33:], atol=1e-3)


def test_masked_rows_follow_the_clean_ones_and_hide_what_they_mask():
    chain = make()
    frames = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    mask = torch.zeros(1, 1, 16, dtype=torch.bool)
    rows = torch.tensor([1])
    unmasked = visual_rows(chain, frames, "image_text", (rows, mask))
    torch.testing.assert_close(unmasked[2], unmasked[1])
    mask[0, 0, 5] = True
    masked = visual_rows(chain, frames, "image_text", (rows, mask))
    assert not torch.allclose(masked[2], masked[1], atol=1e-3)
    torch.testing.assert_close(masked[:2], unmasked[:2])
    # Patch 5 covers rows 8 to 15 and columns 8 to 15: whatever stands there is not seen.
    other = frames.clone()
    other[1, 0, :, 8:16, 8:16] = 255 - other[1, 0, :, 8:16, 8:16]
    again = visual_rows(chain, other, "image_text", (rows, mask), clean=False)
    torch.testing.assert_close(again[0], masked[2])


def test_a_masked_tubelet_hides_all_its_frames():
    chain = make(replace(CONFIG, tubelet_size=2))
    frames = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    mask = torch.zeros(1, 2, 16, dtype=torch.bool)
    mask[0, 1] = True
    other = torch.cat([frames[:, :2], 255 - frames[:, 2:]], dim=1)
    first, second = (
        visual_rows(chain, clip, "video_text", (torch.tensor([0]), mask), clean=False) for clip in (frames, other)
    )
    assert torch.equal(first, second)


def test_recomputation_changes_neither_loss_nor_gradient():
    frames = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    found = []
    for recompute in ("none", "block"):
        chain = make(replace(CONFIG, recompute=recompute, drop_path=0.5)).train()
        torch.manual_seed(3)
        out = visual_rows(chain, frames, "video_text")
        out.square().sum().backward()
        found.append((out, {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}))
    (plain, plain_gradients), (again, again_gradients) = found
    assert torch.equal(plain, again)
    assert plain_gradients.keys() == again_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, again_gradients[name]), name


def test_smaller_frames_use_interpolated_positions():
    chain = make()
    frames = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    assert visual_rows(chain, frames, "video_text").shape == (1, 1 + 2 * 4, 32)


def test_unfold_by_hand():
    frames = torch.arange(2 * 4 * 3).reshape(1, 1, 3, 2, 4)
    patches = unfold(frames, 2)
    assert patches.shape == (1, 1, 2, 12)
    # Channel 0 is 0 1 2 3 / 4 5 6 7; the left patch has 0 1 4 5, then the other channels 8 and 16 higher.
    assert patches[0, 0, 0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]
    assert patches[0, 0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]


def test_position_tables_keep_constants_when_resized():
    table = torch.ones(9, 2) * torch.tensor([2.0, -1.0])
    assert resize_positions(table, (3, 3)) is table
    torch.testing.assert_close(resize_positions(table, (2, 4)), table[:1].expand(8, 2))
    times = torch.tensor([[0.0], [2.0]])
    torch.testing.assert_close(resize_times(times, 4), torch.tensor([[0.0], [0.5], [1.5], [2.0]]))


@pytest.mark.parametrize("pictures", [2, 3, 5])
def test_pictures_of_a_set_are_no_frames_of_a_tubelet(pictures):
    """Whatever frames a clip's tubelets have, each picture of a set is seen by itself, at a place of its own."""
    plain, other = make(replace(CONFIG, num_frames=3)), make(replace(CONFIG, num_frames=6, tubelet_size=2))
    plain.embed.block.visual.times.data.normal_()
    kept = {name: value for name, value in plain.state_dict().items() if "video_delta" not in name}
    other.load_state_dict({**other.state_dict(), **kept})
    frames = torch.randint(0, 256, (2, pictures, 3, 32, 32), dtype=torch.uint8)
    found = visual_rows(plain, frames, "images_text")
    assert found.shape == (2, 1 + pictures * 16, 32)
    assert torch.equal(visual_rows(other, frames, "images_text"), found)
    turned = visual_rows(plain, frames.flip(1), "images_text")[:, 1:].unflatten(1, (-1, 16)).flip(1).flatten(1, 2)
    assert not torch.allclose(turned, found[:, 1:], atol=1e-3), "places matter"


def test_a_picture_keeps_its_place_in_sets_of_other_sizes():
    times = torch.tensor([[0.0], [2.0], [6.0]])
    assert [numbered(times, count).flatten().tolist() for count in (1, 2, 3)] == [[0.0], [0.0, 2.0], [0.0, 2.0, 6.0]]
    assert torch.equal(numbered(times, 6), resize_times(times, 6))


def test_wrong_sizes_are_refused():
    chain = make(replace(CONFIG, tubelet_size=2))
    with pytest.raises(ModelError, match="frames of 20 x 32 pixels: not a multiple of patch_size 8"):
        visual_rows(chain, torch.zeros(1, 1, 3, 20, 32, dtype=torch.uint8), "image_text")
    with pytest.raises(ModelError, match="clip of 3 frames: not a multiple of tubelet_size 2"):
        visual_rows(chain, torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), "video_text")


def test_layer_scale_weighs_both_branches():
    chain = make(replace(CONFIG, layer_scale_init=1e-5))
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if ".scale" in name:
                parameter.zero_()
    frames = torch.randint(0, 256, (1, 1, 3, 32, 32), dtype=torch.uint8)
    layout = StepLayout("image_text", 1, 1, visual={"clean": slice(0, 1)})
    start = chain.embed(State({"frames": frames}, layout))
    assert torch.equal(chain.visual_00(start)["visual"], start["visual"])


def test_drop_path_keeps_the_mean_and_whole_rows():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = drop_path(x, 0.25, training=True)
    kept = dropped.flatten(1)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert bool((kept == kept[:, :1]).all())
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert drop_path(x, 0.25, training=False) is x
    assert drop_path_rates(0.2, 3) == [0.0, 0.1, 0.2]
    assert drop_path_rates(0.2, 1) == [0.0]


def test_drop_path_leaves_out_the_same_samples_without_padding():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, 3, generator=random)
    mask = torch.rand(64, 5, generator=random) < 0.6
    places = mask.flatten().nonzero()[:, 0]
    padding = Padding(mask, places[torch.randperm(len(places), generator=random)], in_order=False)
    torch.manual_seed(0)
    rows = drop_path(x, 0.25, training=True)
    torch.manual_seed(0)
    kept = drop_path(padding.drop(x), 0.25, True, padding)
    torch.testing.assert_close(kept, padding.drop(rows), rtol=0, atol=0)
    dropped = (rows == 0).flatten(1)
    assert bool((dropped == dropped[:, :1]).all())
    assert 0 < int(dropped[:, 0].sum()) < 64
    assert drop_path(kept, 0.25, False, padding) is kept


def test_temporal_gain_starts_the_branches_away_from_zero():
    config = replace(CONFIG, hidden_size=64, temporal_gain=0.5)
    torch.manual_seed(0)
    chain = build_chain(config, (), TOKENS)
    weight = chain.get_submodule("visual_01").block.temporal.temporal_fc.weight
    assert weight.abs().max() <= 0.5 * 2 * 64**-0.5
    assert abs(float(weight.detach().std()) - 0.5 * 0.774**0.5 * 64**-0.5) < 0.005
    times = torch.cat([build_chain(config, (), TOKENS).embed.block.visual.times.flatten() for _ in range(4)])
    assert abs(float(times.detach().std()) - 0.5) < 0.05
    still = build_chain(CONFIG, (), TOKENS)
    assert not still.embed.block.visual.times.any()
    assert not still.get_submodule("visual_01").block.temporal.temporal_fc.weight.any()


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_spatial_positions_start_at_their_deviation(std: float):
    torch.manual_seed(0)
    embedding = build_chain(replace(CONFIG, hidden_size=64, position_std=std), (), TOKENS).embed.block.visual
    positions = embedding.positions.detach()
    assert positions.abs().max() <= 2 * std
    assert float(positions.std()) == pytest.approx(std * 0.774**0.5, rel=0.1), "cut at two deviations"
    assert embedding.class_token.detach().abs().max() <= 0.04 and embedding.mask_token.detach().abs().max() <= 0.04
