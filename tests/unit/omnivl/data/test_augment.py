import numpy as np
import pytest

from omnivl.data.augment import View, box_around, crop_box, evaluation_view, resize, training_view
from omnivl.data.config import AugmentConfig
from omnivl.data.rand_augment import OPERATION_NAMES, OPERATIONS, apply_operation
from omnivl.data.sizes import Size

STRONG = AugmentConfig(
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.2,
    color_probability=1.0,
    grayscale=0.2,
    rand_augment_operations=3,
    rand_augment_magnitude=9.0,
)
PLAIN = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)


def noise(frames: int = 1, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_view_is_a_pure_function_of_the_generator():
    pixels = noise()
    first = training_view(pixels, 16, STRONG, random(3), flip_allowed=True).pixels
    assert first.shape == (1, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, training_view(pixels, 16, STRONG, random(3), flip_allowed=True).pixels)
    assert not np.array_equal(first, training_view(pixels, 16, STRONG, random(4), flip_allowed=True).pixels)
    assert np.array_equal(pixels, noise()), "the input, which may be cached, is not written to"


def test_all_frames_of_a_clip_get_the_same_draw():
    still = noise()
    clip = np.repeat(still, 5, axis=0)
    for seed in range(60):  # 3 operations of 11 each time: every operation occurs
        view = training_view(clip, 16, STRONG, random(seed), flip_allowed=True).pixels
        assert all(np.array_equal(frame, view[0]) for frame in view[1:]), seed
        assert np.array_equal(view[:1], training_view(still, 16, STRONG, random(seed), flip_allowed=True).pixels)


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_each_operation_keeps_shape_and_type_and_does_something(name):
    pixels = np.tile(np.linspace(20, 220, 24).astype(np.uint8)[None, None, :, None], (2, 24, 1, 3))
    pixels[:, 5:10, 5:10] = (250, 10, 60)
    before = pixels.copy()
    changed, _ = apply_operation(name, pixels, 1.0, random())
    assert changed.shape == pixels.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, before)
    assert np.array_equal(pixels, before)
    if name not in ("auto_contrast", "equalize"):
        assert np.array_equal(apply_operation(name, pixels, 0.0, random())[0], before), "strength 0 changes nothing"


def test_tables_by_hand():
    pixels = np.array([0, 100, 127, 128, 200, 255], dtype=np.uint8).reshape(1, 1, 6, 1).repeat(3, axis=3)
    # 4 bits dropped: 100 = 0b01100100 -> 96, 127 -> 112, 128 -> 128, 200 = 0b11001000 -> 192, 255 -> 240
    assert OPERATIONS["posterize"](pixels, 1.0, random())[0, 0, :, 0].tolist() == [0, 96, 112, 128, 192, 240]
    # threshold 256 * (1 - 1 / 2) = 128
    assert OPERATIONS["solarize"](pixels, 1.0, random())[0, 0, :, 0].tolist() == [0, 100, 127, 127, 55, 0]
    low = (pixels // 5 + 50).astype(np.uint8)  # 50, 70, 75, 75, 90, 101: (70 - 50) * 255 / 51 = 100
    assert OPERATIONS["auto_contrast"](low, 1.0, random())[0, 0, :, 0].tolist() == [0, 100, 125, 125, 200, 255]


@pytest.mark.parametrize(
    ("uniforms", "expected"),
    [
        # area (0.25 + 0.75 * 0) * 100 * 50 = 1250, ratio 0.5 * 4 ** 0.5 = 1 -> 35.4 x 35.4, at 0
        ((0.0, 0.5, 0.0, 0.0), (0, 0, 35, 35)),
        # the same box at the far end: left 0.999 * 66 = 65, top 0.999 * 16 = 15
        ((0.0, 0.5, 0.999, 0.999), (65, 15, 35, 35)),
        # whole area, ratio 2 -> 100 x 50
        ((1.0, 1.0, 0.9, 0.9), (0, 0, 100, 50)),
    ],
)
def test_crop_boxes_by_hand(uniforms, expected):
    config = AugmentConfig(crop_scale=(0.25, 1.0), crop_ratio=(0.5, 2.0))
    assert crop_box(100, 50, config, np.array(uniforms)) == expected


def test_a_box_that_fits_in_no_draw_is_the_largest_one_in_the_middle():
    def box(width: int, height: int, **ranges: tuple[float, float]) -> tuple[int, int, int, int]:
        return crop_box(width, height, AugmentConfig(**ranges), np.array([0.9, 0.5, 0.9, 0.9]))

    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    assert box(60, 80, **whole) == (0, 10, 60, 60)
    assert box(80, 60, **whole) == (10, 0, 60, 60)
    # at most 4:3 -> 67 of 200 columns, round(50 * 4 / 3) = 67; left (200 - 67) // 2 = 66
    assert box(200, 50, crop_scale=(1.0, 1.0), crop_ratio=(0.75, 4 / 3)) == (66, 0, 67, 50)
    # at least 3:4 -> round(50 / 0.75) = 67 of 200 rows
    assert box(50, 200, crop_scale=(1.0, 1.0), crop_ratio=(0.75, 4 / 3)) == (0, 66, 50, 67)


def peers_box(width: int, height: int, config: AugmentConfig, random: np.random.Generator) -> tuple[int, ...]:
    """``RandomResizedCrop.get_params`` as torchvision documents it: ten draws, then a crop in the middle."""
    for _ in range(10):
        area = width * height * random.uniform(*config.crop_scale)
        ratio = np.exp(random.uniform(*np.log(config.crop_ratio)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1)), w, h
    low, high = config.crop_ratio
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((640, 360), (0.5, 1.0), (3 / 4, 4 / 3)),
        ((96, 96), (0.6, 1.0), (3 / 4, 4 / 3)),
        ((60, 80), (0.9, 1.0), (1.0, 1.0)),
        ((300, 40), (0.08, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_crop_boxes_have_the_distribution_of_torchvision(size, scale, ratio):
    config = AugmentConfig(crop_scale=scale, crop_ratio=ratio)
    draws, own, peers = 20_000, random(1), random(2)
    ours = np.array([crop_box(*size, config, own.random(4)) for _ in range(draws)])
    theirs = np.array([peers_box(*size, config, peers) for _ in range(draws)])
    shape = ours[:, 2] / ours[:, 3]
    rounded = 1 / ours[:, 2:].min(axis=1)  # a side is a whole number of pixels
    assert ((shape >= ratio[0] * (1 - rounded)) & (shape <= ratio[1] * (1 + rounded))).all()
    for column in range(4):  # Kolmogorov-Smirnov; 1.95 * sqrt(2 / n) is passed by chance in one of 1,000
        edges = np.arange(max(size) + 2)
        steps = [np.histogram(boxes[:, column], edges)[0].cumsum() / draws for boxes in (ours, theirs)]
        assert np.abs(steps[0] - steps[1]).max() < 1.95 * np.sqrt(2 / draws)


def test_flips_only_where_the_text_allows_it():
    pixels = noise(height=16, width=16)
    always = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=1.0)
    assert np.array_equal(training_view(pixels, 16, always, random(), flip_allowed=True).pixels, pixels[:, :, ::-1])
    assert np.array_equal(training_view(pixels, 16, always, random(), flip_allowed=False).pixels, pixels)


def test_nothing_asked_nothing_done():
    pixels = noise(height=16, width=16)
    assert np.array_equal(training_view(pixels, 16, PLAIN, random(), flip_allowed=True).pixels, pixels)


def turned(pixels: np.ndarray, uniforms: float = 0.999999, **changes: object) -> np.ndarray:
    return turned_view(pixels, len(pixels[0]), uniforms, **changes).pixels


def turned_view(pixels: np.ndarray, size: Size, uniforms: float = 0.999999, **changes: object) -> View:
    """A view at the far end of its ranges of rotation and zoom; the crop is the whole picture."""

    class Always(np.random.Generator):
        def random(self, size=None, *rest):  # type: ignore[override]
            return np.full(size, uniforms)

    config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, **changes)  # type: ignore[arg-type]
    return training_view(pixels, size, config, Always(np.random.PCG64(0)), flip_allowed=False)


def test_a_quarter_turn_by_hand():
    pixels = noise(frames=2, height=16, width=16)
    view = turned(pixels, rotate=90.0)
    # 90 degrees: what stood to the right of the middle is seen above it
    assert np.array_equal(view, np.rot90(pixels, axes=(1, 2)))
    back = turned(pixels, uniforms=0.0, rotate=90.0)
    assert np.array_equal(back, np.rot90(pixels, k=-1, axes=(1, 2)))


def test_a_quarter_turn_in_a_view_of_another_ratio_by_hand():
    pixels = noise(frames=2, height=16, width=24)
    view = turned_view(pixels, size=(24, 16), rotate=90.0)
    # view (x, y) shows column 11.5 - (y - 7.5) and row 7.5 + (x - 11.5); beyond rows 0 .. 15 the border goes on
    rows, columns = (np.arange(24) - 4).clip(0, 15), 19 - np.arange(16)
    assert np.array_equal(view.pixels, pixels[:, rows[None, :], columns[:, None]])
    # columns 4 .. 7 and rows 0 .. 3 are seen in rows 12 .. 15 and columns 4 .. 7
    found = view.place.boxes(np.array([[4 / 24, 0.0, 8 / 24, 4 / 16]]))[0]
    np.testing.assert_allclose(found, [[4 / 24, 12 / 16, 8 / 24, 1.0]], atol=1e-4)


def test_zoom_by_hand():
    pixels = np.full((1, 16, 16, 3), 80, dtype=np.uint8)
    pixels[:, 4:12, 4:12] = 200
    # twice as large: the middle 8 x 8 fill the view, but for the blend at its rim
    assert (turned(pixels, zoom=(1.0, 2.0))[:, 1:15, 1:15] == 200).all()
    # half as large: the picture covers 8 x 8 in the middle, and what is beyond it is its border continued, or white
    small = turned(pixels, uniforms=0.0, zoom=(0.5, 1.0))
    assert (small[:, :4] == 80).all()
    assert (small[:, 6:10, 6:10] == 200).all()
    white = turned(pixels, uniforms=0.0, zoom=(0.5, 1.0), fill="white")
    assert (white[:, :3] == 255).all()
    assert (white[:, 6:10, 6:10] == 200).all()


def test_a_turned_crop_is_the_resized_crop_where_nothing_turns():
    pixels = np.tile(np.linspace(0, 255, 24).astype(np.uint8)[None, :, None, None], (1, 1, 24, 3))
    plain = AugmentConfig(crop_scale=(0.3, 0.3), crop_ratio=(1, 1), flip=0)
    near = AugmentConfig(crop_scale=(0.3, 0.3), crop_ratio=(1, 1), flip=0, zoom=(1.0, 1.0000001))
    for seed in range(20):
        views = [training_view(pixels, 32, config, random(seed), flip_allowed=True).pixels for config in (plain, near)]
        difference = np.abs(views[0].astype(int) - views[1])[:, 2:-2, 2:-2]  # at the rim only one of them sees beyond
        assert difference.max() <= 1


def only(**changes: float) -> AugmentConfig:
    return AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, color_probability=1.0, **changes)


def test_colours_by_hand():
    pixels = np.full((1, 4, 4, 3), (100, 50, 200), dtype=np.uint8)
    uniforms = random().random(12)
    strengths = 2 * uniforms[7:11] - 1
    bright = training_view(pixels, 4, only(brightness=0.5), random(), flip_allowed=False).pixels[0, 0, 0]
    assert np.abs(bright - np.clip(np.array([100, 50, 200]) * (1 + 0.5 * strengths[0]), 0, 255)).max() <= 0.51
    # saturation s: s * colour + (1 - s) * luma, luma = 0.299 * 100 + 0.587 * 50 + 0.114 * 200 = 82.05
    s = 1 + 0.5 * strengths[2]
    saturated = training_view(pixels, 4, only(saturation=0.5), random(), flip_allowed=False).pixels[0, 0, 0]
    assert np.abs(saturated - np.clip(s * np.array([100, 50, 200]) + (1 - s) * 82.05, 0, 255)).max() <= 0.51
    # contrast of a uniform picture: c * colour + (1 - c) * mean luma, the same formula with c
    c = 1 + 0.5 * strengths[1]
    contrasted = training_view(pixels, 4, only(contrast=0.5), random(), flip_allowed=False).pixels[0, 0, 0]
    assert np.abs(contrasted - np.clip(c * np.array([100, 50, 200]) + (1 - c) * 82.05, 0, 255)).max() <= 0.51


def test_hue_and_grayscale():
    gray = np.full((1, 4, 4, 3), 90, dtype=np.uint8)
    assert np.array_equal(training_view(gray, 4, only(hue=0.5), random(), flip_allowed=False).pixels, gray), (
        "grey has no hue"
    )
    colour = np.full((1, 4, 4, 3), (200, 30, 60), dtype=np.uint8)
    # 0.299 * 200 + 0.587 * 30 + 0.114 * 60 = 84.25
    dropped = training_view(colour, 4, only(grayscale=1.0), random(), flip_allowed=False).pixels
    assert np.unique(dropped).tolist() == [84]


def test_blur_spreads_an_edge_by_its_deviation_and_draws_nothing_where_it_is_off():
    edge = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    edge[:, :, 32:] = 200
    blurred = training_view(edge, 64, only(blur=1.0, blur_sigma=(3.0, 3.0)), random(), flip_allowed=False).pixels
    # Half a pixel beside the edge the share of the other side is that of a normal distribution beyond 0.5 / 3.
    assert blurred[0, 32, 31:33, 0].tolist() == [pytest.approx(200 * share, abs=2) for share in (0.434, 0.566)]
    assert np.array_equal(blurred[0, 0], blurred[0, 63])
    draws = random(), random()
    views = [
        training_view(edge, 8, only(blur=blur), draw, flip_allowed=False).pixels
        for blur, draw in zip((0.0, 1e-9), draws, strict=True)
    ]
    assert np.array_equal(*views)
    assert draws[0].random() != draws[1].random()
    replay = random()
    replay.random(13)
    third = random()
    training_view(edge, 8, only(), third, flip_allowed=False)
    assert third.random() == replay.random(), "as many draws as before there was a blur"


def test_evaluation_view_is_the_middle():
    pixels = noise(height=16, width=24)
    assert np.array_equal(evaluation_view(pixels, 16).pixels, pixels[:, :, 4:20])
    assert evaluation_view(pixels, 8).pixels.shape == (1, 8, 8, 3)


def test_resize_averages_when_it_shrinks():
    pixels = np.zeros((1, 2, 4, 3), dtype=np.uint8)
    pixels[0, :, 2:] = 100
    pixels[0, 0, 0] = 40
    assert resize(pixels, 2, 1)[0, 0, :, 0].tolist() == [10, 100]  # (40 + 0 + 0 + 0) / 4


@pytest.mark.parametrize(
    ("uniforms", "expected"),
    [
        ((0, 0, 0, 0), (0, 0, 60, 40)),
        ((0.999, 0.999, 0.999, 0.999), (20, 10, 80, 40)),
        ((0.5, 0, 0, 0.5), (10, 0, 50, 45)),
    ],
)
def test_a_crop_around_boxes_by_hand(uniforms, expected):
    """Of 100 x 50 pixels, around columns 20 to 60 and rows 10 to 40 of two boxes."""
    kept = np.array([[0.2, 0.5, 0.5, 0.8], [0.3, 0.2, 0.6, 0.4]])
    assert box_around(100, 50, kept, np.array(uniforms)) == expected


def test_a_crop_around_boxes_holds_them_and_may_be_the_whole_picture():
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        low, high = np.sort(draw.random((2, 2)), axis=0)
        kept = np.array([[*low, *np.maximum(high, low + 0.01)]]).clip(0, 1)
        left, top, width, height = box_around(40, 30, kept, draw.random(4))
        assert left <= kept[0, 0] * 40 and left + width >= kept[0, 2] * 40 and left >= 0 and left + width <= 40
        assert top <= kept[0, 1] * 30 and top + height >= kept[0, 3] * 30 and top >= 0 and top + height <= 30
        seen.add((left == 0, left + width == 40, top == 0, top + height == 30))
    assert len(seen) > 10, "each border is drawn by itself"


def test_a_view_keeps_the_boxes_that_it_is_given():
    pixels, kept = noise(1, 40, 60), np.array([[0.1, 0.6, 0.3, 0.9]])
    config = AugmentConfig(crop_scale=(0.01, 0.02), flip=0.5)
    for seed in range(40):
        view = training_view(pixels, 16, config, random(seed), flip_allowed=True, kept=kept)
        placed, present = view.place.boxes(kept)
        assert present.all()
        assert (placed[:, 2:] > placed[:, :2]).all() and placed.min() >= 0 and placed.max() <= 1
        across, down = placed[0, 2] - placed[0, 0], placed[0, 3] - placed[0, 1]
        assert across >= 0.19 and down >= 0.29, "no smaller than in the whole picture"


@pytest.mark.parametrize(("size", "stretched"), [((16, 16), True), ((16, 16), False), ((8, 24), False)])
def test_a_view_of_whole_pictures_shows_all_of_one_where_nothing_is_cropped(size, stretched):
    """Also of a later picture of a set, which has the size of the first whatever its own ratio."""
    pixels = noise(1, 20, 60)
    view = training_view(pixels, size, PLAIN, random(), flip_allowed=True, stretched=stretched)
    assert np.array_equal(view.pixels, resize(pixels, *size))
    assert np.array_equal(view.pixels, evaluation_view(pixels, size).pixels)
    corners = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert np.array_equal(view.place.boxes(corners)[0], corners)


@pytest.mark.parametrize(("size", "stretched", "ratio"), [((8, 24), False, 3), ((16, 16), True, 1), (16, False, 1)])
def test_crops_have_ratios_relative_to_the_picture_or_to_a_square(size, stretched, ratio):
    """Of 20 x 60 pixels. A set's later picture is cropped by its own ratio, as it is seen whole in an evaluation."""
    pixels, config = noise(1, 20, 60), AugmentConfig(crop_scale=(0.2, 0.3), crop_ratio=(1.0, 1.0), flip=0)
    for seed in range(20):
        view = training_view(pixels, size, config, random(seed), flip_allowed=False, stretched=stretched)
        across, down = 60 / view.place.matrix[0, 0], 20 / view.place.matrix[1, 1]  # pixels of the crop
        assert across / down == pytest.approx(ratio, rel=0.15), "up to whole pixels"
        assert 0.15 < across * down / 1200 < 0.35
