"""Which pictures and clips ``omnivl routing`` shows."""

from functools import partial

import pytest

from launcher.commands.routing import _all_sets
from omnivl.architectures import OmniVL, ViLT
from omnivl.data.sources.base import BadSampleError
from omnivl.errors import DataError
from omnivl.inference.pictures import Media, PictureSet

TINY = OmniVL.presets["tiny"]


def opened(source: str) -> partial[PictureSet]:
    return partial(PictureSet, source, where={}, sizes=TINY.inputs, max_samples=3)


def test_all_that_model_and_source_have_is_shown() -> None:
    assert [one.media for one in _all_sets(TINY, opened("emoji"))] == ["image", "video"]
    assert [one.media for one in _all_sets(TINY, opened("motion"))] == ["video"], "one frame shows no motion"
    assert [one.media for one in _all_sets(ViLT(), opened("emoji"))] == ["image"]


def test_a_source_without_either_and_a_bad_sample_are_refused() -> None:
    def nothing(media: Media) -> PictureSet:
        raise DataError(f"no {media}")

    def bad(media: Media) -> PictureSet:
        if media == "image":
            return opened("emoji")(media)
        raise DataError("bad") from BadSampleError("broken_video", "a.tar:b", "cut")

    with pytest.raises(DataError, match="no image"):
        _all_sets(TINY, nothing)
    with pytest.raises(DataError, match="bad"):
        _all_sets(TINY, bad)
