"""Generated clips: pure, and unreadable from a single frame."""

import pickle
from collections import Counter

import numpy as np
import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.base import Sample
from omnivl.data.sources.motion import MotionSource
from omnivl.data.sources.motion_poses import BOUNCES, MIN_FRAMES, MOTION_CLASSES, MOVES, ORDER, PARAMETERS, draw_poses
from omnivl.data.sources.motion_sprites import draw_frame, read_sprite
from omnivl.errors import DataError
from omnivl.randomness import generator

OPPOSITES = [
    ("moves left", "moves right"),
    ("moves up", "moves down"),
    ("zooms in", "zooms out"),
    ("rotates clockwise", "rotates counterclockwise"),
]
DRAWS = 2000
LARGEST_DISTANCE = 0.06  # 2000 uniform draws are further off (Kolmogorov-Smirnov) once in a million times
FRAMES = (0, 3, 7)


def entry(**where: tuple[str, ...]) -> DataEntryConfig:
    return DataEntryConfig(source="motion", kind="video_text", where=where)


@pytest.fixture(scope="module")
def source() -> MotionSource:
    return MotionSource(entry(style=("fluent", "noto")), seed=3)


@pytest.mark.parametrize("motion", MOTION_CLASSES)
def test_each_frame_of_each_motion_has_the_same_distribution(motion: str) -> None:
    drawn = np.stack([draw_poses(motion, 8, generator(7, motion, i)).values for i in range(DRAWS)])
    uniform = (np.arange(DRAWS) + 0.5) / DRAWS
    for frame in FRAMES:
        distance = np.abs(np.sort(drawn[:, frame], axis=0) - uniform[:, None]).max(axis=0)
        assert (distance < LARGEST_DISTANCE).all(), dict(zip(PARAMETERS, distance, strict=True))
        correlation = np.corrcoef(drawn[:, frame].T) - np.eye(len(PARAMETERS))
        assert np.abs(correlation).max() < 0.11, "5 / sqrt(2000): parameters of one frame are independent"


@pytest.mark.parametrize(("motion", "opposite"), OPPOSITES)
def test_frames_in_reverse_order_show_the_opposite(motion: str, opposite: str) -> None:
    column = PARAMETERS.index(MOVES[motion][0])
    assert MOVES[opposite] == (MOVES[motion][0], -MOVES[motion][1])
    poses = draw_poses(motion, 8, generator(1)).values
    steps = np.diff(poses[:, column])
    steps = (steps + 0.5) % 1 - 0.5  # the short way around the circle
    assert (np.sign(steps) == MOVES[motion][1]).all()
    backwards = np.diff(poses[::-1, column])
    assert (np.sign((backwards + 0.5) % 1 - 0.5) == MOVES[opposite][1]).all()
    others = np.delete(poses, column, axis=1)
    assert (others == others[0]).all()


@pytest.mark.parametrize("motion", list(BOUNCES))
def test_bounces_turn_around_so_many_times(motion: str) -> None:
    # In a long clip the height has one top and one bottom per bounce, apart from the two ends.
    height = draw_poses(motion, 600, generator(2, motion)).values[:, 1]
    turns = int((np.diff(np.sign(np.diff(height))) != 0).sum())
    assert abs(turns - 2 * BOUNCES[motion]) <= 1


def test_the_second_drawing_comes_later_and_is_seen_half_of_the_time() -> None:
    shown = np.stack([draw_poses(ORDER, 8, generator(4, i)).second for i in range(DRAWS)])
    assert not shown[:, 0].any()
    assert shown[:, -1].all()
    assert (np.diff(shown.astype(int), axis=1) >= 0).all()
    assert shown.mean() == pytest.approx(0.5, abs=0.02)


def object_mask(sample: Sample, frame: int) -> np.ndarray:
    """Where the frame is not background, float32 ``[64, 64]``."""
    assert sample.frames is not None
    background = np.asarray(sample.meta["background"], dtype=np.int16)
    difference = np.abs(sample.frames[frame].astype(np.int16) - background).max(axis=2)
    return (difference > 20).astype(np.float32)


def moments(mask: np.ndarray) -> np.ndarray:
    """Mass, centre and spread."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros(5)
    return np.array([mask.mean(), rows.mean() / 64, columns.mean() / 64, rows.std() / 64, columns.std() / 64])


def coarse(mask: np.ndarray) -> np.ndarray:
    """The mask at 8 x 8."""
    return mask.reshape(8, 8, 8, 8).mean(axis=(1, 3)).ravel()


def probe_accuracy(features: np.ndarray, labels: np.ndarray, train: int) -> float:
    """Least-squares classifier with squares of the features, on held-out clips."""
    features = np.concatenate([features, features**2, np.ones((len(features), 1))], axis=1)
    targets = np.eye(labels.max() + 1)[labels]
    gram = features[:train].T @ features[:train] + 1e-1 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[:train].T @ targets[:train])
    return float(((features[train:] @ weights).argmax(1) == labels[train:]).mean())


def test_one_frame_is_at_chance_and_the_order_of_frames_is_not(source: MotionSource) -> None:
    count, train = 1200, 800
    clips = [source.read(i) for i in range(count)]
    labels = np.array([MOTION_CLASSES.index(str(clip.label)) for clip in clips])
    chance = 1 / len(MOTION_CLASSES)
    for frame in (0, 7):
        masks = [object_mask(clip, frame) for clip in clips]
        features = np.stack([np.concatenate([moments(mask), coarse(mask)]) for mask in masks])
        accuracy = probe_accuracy(features, labels, train)
        assert accuracy < chance + 4 * np.sqrt(chance * (1 - chance) / (count - train)), frame
    paths = np.stack([[moments(object_mask(clip, frame)) for frame in range(8)] for clip in clips])
    steps = np.diff(paths, axis=1)
    ordered = np.concatenate([np.sort(steps, axis=1).reshape(count, -1), np.abs(steps).mean(axis=1)], axis=1)
    assert probe_accuracy(ordered, labels, train) > 3 * chance


def test_a_clip_is_a_pure_function_of_seed_part_and_index(source: MotionSource) -> None:
    again = pickle.loads(pickle.dumps(source))
    for index in (0, 5, 99_999):
        first, second = source.read(index), again.read(index)
        assert first.frames is not None
        assert second.frames is not None
        assert np.array_equal(first.frames, second.frames)
        assert (first.captions, first.identity, first.label) == (second.captions, second.identity, second.label)
    other_seed = MotionSource(entry(style=("fluent", "noto")), seed=4)
    other_part = MotionSource(entry(style=("fluent", "noto"), part=("test",)), seed=3)
    texts = [[clips.read(i).captions for i in range(20)] for clips in (source, other_seed, other_part)]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_samples_say_what_they_show(source: MotionSource) -> None:
    assert len(source) == 100_000
    seen: Counter[str] = Counter()
    for i in range(150):
        sample = source.read(i)
        assert sample.frames is not None
        assert sample.frames.shape == (8, 64, 64, 3)
        assert sample.frames.dtype == np.uint8
        assert sample.label in MOTION_CLASSES
        seen[sample.label] += 1
        (caption,) = sample.captions
        assert caption.startswith(f"the {sample.meta['name']} ")
        assert ("appears before the " if sample.label == ORDER else sample.label) in caption
        assert sample.identity is not None
        assert sample.identity.startswith(f"{sample.label}:{sample.meta['hexcode']}")
        assert sample.meta["style"] in ("fluent", "noto")
        assert sample.meta["flip"] is False
    assert set(seen) == set(MOTION_CLASSES)
    assert source.classes == tuple(sorted(MOTION_CLASSES))


def test_drawings_are_filtered_and_frames_sized() -> None:
    clips = MotionSource(entry(style=("twemoji",), split=("test",)), seed=0, num_frames=12, size=40, length=7)
    assert len(clips) == 7
    sample = clips.read(0)
    assert sample.frames is not None
    assert sample.frames.shape == (12, 40, 40, 3)
    assert (sample.meta["style"], sample.meta["split"]) == ("twemoji", "test")


def test_a_pose_is_drawn_where_it_says() -> None:
    picture = np.full((96, 96, 3), 200, dtype=np.uint8)
    frame = draw_frame(picture, (0, 0, 0), np.array([0.5, 0.0, 0.0, 0.0]), 100)
    rows, columns = np.nonzero(frame[:, :, 0] > 100)
    # zoom 0: 0.35 of 100 px; x 0.5: the middle, 50; y 0: 0.15 of 100 px from the top, so it sticks out 2.5 px
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(50, abs=1)
    assert columns.max() - columns.min() + 1 == pytest.approx(35, abs=1)
    assert rows.min() == 0
    assert rows.max() + 1 == pytest.approx(32.5, abs=1)


def test_a_quarter_turn_is_clockwise() -> None:
    picture = np.zeros((96, 96, 3), dtype=np.uint8)
    picture[:24, 36:60] = 255  # a mark at the top
    frame = draw_frame(picture, (0, 0, 0), np.array([0.5, 0.5, 0.25, 1.0]), 100)
    rows, columns = np.nonzero(frame[:, :, 0] > 100)
    assert columns.mean() > 70  # to the right
    assert rows.mean() == pytest.approx(50, abs=2)


def test_sprites_keep_their_cut_out(source: MotionSource) -> None:
    sprite = read_sprite(source._drawings.read(0))
    assert sprite.on((10, 200, 30))[0, 0].tolist() == [10, 200, 30]
    assert sprite.contrast((10, 200, 30)) > 0
    assert sprite.asymmetry > 0


def test_mistakes_are_named() -> None:
    with pytest.raises(
        DataError, match="kind is 'image_text'; allowed, since one frame shows no motion: 'video_text', "
    ):
        MotionSource(DataEntryConfig(source="motion", kind="image_text"), seed=0)
    with pytest.raises(DataError, match=f"num_frames is 4; allowed: {MIN_FRAMES} or more"):
        MotionSource(entry(), seed=0, num_frames=4)
    with pytest.raises(DataError, match=r"where.part is \['all'\]; allowed: one of train, val, test"):
        MotionSource(entry(part=("all",)), seed=0)
