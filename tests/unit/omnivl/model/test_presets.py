"""Presets, overrides and their errors."""

import pytest

from omnivl.errors import ModelError
from omnivl.model.config import ModelConfig
from omnivl.model.presets import PRESETS, check_config, resolve


def test_every_preset_fits_together():
    for config in PRESETS.values():
        check_config(config)


def test_base_takes_both_kinds_of_clips():
    assert resolve("base") == ModelConfig()
    assert resolve("base", {"video_size": 224, "num_frames": 8}).grid(is_video=True) == (14, 14)
    assert resolve("base").grid(is_video=True) == (7, 7)


def test_giant_has_its_inner_size_exactly():
    assert resolve("giant").inner_size == 6144


def test_unknown_preset():
    with pytest.raises(ModelError) as error:
        resolve("bas")
    assert str(error.value) == (
        "model.preset: 'bas' is not known; allowed: tiny, small, base, large, giant; did you mean 'base'?"
    )


def test_unknown_field():
    with pytest.raises(ModelError, match="did you mean 'num_heads'"):
        resolve("base", {"num_head": 3})


def test_all_misfits_at_once():
    with pytest.raises(ModelError) as error:
        resolve("tiny", {"num_heads": 5, "image_size": 65, "num_frames": 7, "tubelet_size": 2})
    assert str(error.value).splitlines() == [
        "model.hidden_size: 192 is no multiple of num_heads 5; change either",
        "model.image_size: 65 is no multiple of patch_size 8; change either",
        "model.num_frames: 7 is no multiple of tubelet_size 2; change either",
    ]


def test_time_positions():
    assert ModelConfig(tubelet_size=2).time_positions(8) == 4
    assert ModelConfig(tubelet_size=2).time_positions(1) == 1
