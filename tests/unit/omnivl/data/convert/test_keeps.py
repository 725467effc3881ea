"""What ``--shorter-side`` makes of each form that the loader takes is, to the loader, what the original was."""

import io

import av
import cv2
import media_files
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from PIL import Image

from omnivl.data import limits
from omnivl.data.convert import media as conversion
from omnivl.data.convert.media import examine, shrink
from omnivl.data.decode import decode_clip, decode_still
from omnivl.data.formats import frame_durations, is_clip
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.video import clip_frames

LIMITS = DecodeLimits()
PICTURES = {name: (extension, media) for name, extension, media in media_files.pictures()}
CLIPS = {name: (extension, media) for name, extension, media in media_files.clips()}
FILES = PICTURES | CLIPS


def decoded(media: bytes, extension: str) -> np.ndarray:
    """All that training can show of a file."""
    sample = Sample("k", "s:k", media, extension)
    return decode_clip(sample, LIMITS, range) if is_clip(extension, media) else decode_still(sample, LIMITS)


def times(media: bytes) -> list[float]:
    """Seconds of each frame after the first one."""
    frames = list(clip_frames(media, "s:k", LIMITS))
    return [float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames]


def difference(original: np.ndarray, converted: np.ndarray) -> float:
    size = converted.shape[2:0:-1]
    scaled = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in original])
    return float(np.abs(scaled.astype(int) - converted).mean())


@pytest.mark.parametrize("name", FILES)
def test_the_loader_sees_the_same(name):
    extension, media = FILES[name]
    scaled, new_extension = shrink(media, extension, 24, "list:1")
    moves = name in CLIPS
    assert is_clip(extension, media) == is_clip(new_extension, scaled) == moves
    original, converted = decoded(media, extension), decoded(scaled, new_extension)
    assert len(original) == len(converted) == (12 if moves else 1)
    height, width = original.shape[1:3]
    even = new_extension == "mp4"
    for side, new in ((width, converted.shape[2]), (height, converted.shape[1])):
        exact = round(side * 24 / min(width, height))
        assert new == exact + even * exact % 2
    assert difference(original, converted) < 4
    assert shrink(scaled, new_extension, 24, "list:1") == (scaled, new_extension)


@pytest.mark.parametrize(
    "name",
    [name for name, (extension, _) in CLIPS.items() if extension not in ("gif", "webp") and "without" not in name],
)
def test_each_frame_keeps_its_time(name):
    extension, media = CLIPS[name]
    scaled, _ = shrink(media, extension, 24, "list:1")
    assert times(scaled) == pytest.approx(times(media), abs=2e-5)
    if "varying" in name or "late" in name:
        assert times(scaled) == pytest.approx([time / 1000 for time in media_files.VARYING], abs=2e-5)


@pytest.mark.parametrize(
    "turn", [(0, False), (90, False), (180, False), (-90, False), (0, True), (90, True), (180, True)]
)
def test_the_display_matrix_stays(turn):
    scaled, _ = shrink(media_files.clip(turn=turn), "mp4", 24, "list:1")

    def matrix(media: bytes) -> list[int]:
        frame = next(clip_frames(media, "s:k", LIMITS))
        found = frame.side_data.get(Type.DISPLAYMATRIX)
        upright = [1 << 16, 0, 0, 0, 1 << 16]
        return upright if found is None else np.frombuffer(bytes(found), dtype=np.int32)[:5].tolist()

    assert matrix(scaled) == pytest.approx(matrix(media_files.clip(turn=turn)), abs=2)


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_equal_frames_and_their_durations_stay(form):
    """Distinct frames, and frames that are equal once they are scaled."""
    frames = [Image.fromarray(media_files.scene(number)) for number in (0, 1, 2, 3)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=[40, 50, 30, 70], loop=3)
    one = io.BytesIO()
    speck = media_files.scene(0).copy()
    speck[0, 0] = 255 - speck[0, 0]
    flat = [Image.fromarray(pixels) for pixels in (media_files.scene(0), speck, media_files.scene(0))]
    flat[0].save(one, form, save_all=True, append_images=flat[1:], duration=[40, 50, 30], loop=3)
    for media, durations in ((file.getvalue(), [40, 50, 30, 70]), (one.getvalue(), [40, 50, 30])):
        scaled, extension = shrink(media, form.lower(), 8, "list:1")
        assert extension == "webp"
        assert frame_durations(scaled) == durations
        with Image.open(io.BytesIO(scaled)) as picture:
            assert (picture.n_frames, picture.info["loop"]) == (len(durations), 3)


def test_depth_and_colours_stay():
    for name in ("PNG, 16 bits of grey", "PNG, 16 bits of colour", "PNG, 16 bits and alpha"):
        extension, media = PICTURES[name]
        scaled, new_extension = shrink(media, extension, 24, "list:1")
        before, after = (cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_UNCHANGED) for one in (media, scaled))
        assert (new_extension, after.dtype, after.ndim) == ("png", np.uint16, before.ndim)
        assert np.unique(after & 255).size > 20, "the lower eight bits hold something"
        assert abs(before.astype(int).mean() - after.mean()) < 40
    for name in ("JPEG, grey", "PNG, grey", "BMP, grey"):
        extension, media = PICTURES[name]
        assert Image.open(io.BytesIO(shrink(media, extension, 24, "list:1")[0])).mode == "L"


def test_a_colour_profile_stays_where_it_fits():
    srgb = b"\0" * 16 + b"RGB " + b"\0" * 108
    cmyk = b"\0" * 16 + b"CMYK" + b"\0" * 108
    for mode, profile, expected in (("RGB", srgb, srgb), ("RGB", cmyk, None), ("CMYK", cmyk, None)):
        media = media_files.saved("JPEG", mode, icc_profile=profile)
        scaled, _ = shrink(media, "jpg", 24, "list:1")
        assert Image.open(io.BytesIO(scaled)).info.get("icc_profile") == expected


def verdict(call) -> str:
    try:
        call()
    except BadSampleError as error:
        return error.rejection.cause
    return "good"


@pytest.mark.parametrize("name", FILES)
def test_a_full_check_refuses_what_training_refuses(name):
    """The file itself, cut at several places, with flipped bytes, and what is nothing at all."""
    extension, media = FILES[name]
    random = np.random.default_rng(len(media))
    inputs = [media, b"", b"no picture", *(media[: round(len(media) * share)] for share in (0.1, 0.5, 0.9, 0.99))]
    for _ in range(12):
        flipped = bytearray(media)
        for place in random.integers(0, len(media), 3):
            flipped[place] = random.integers(256)
        inputs.append(bytes(flipped))
    verdicts: list[str] = []
    for one in inputs:
        training = verdict(lambda: decoded(one, extension))  # noqa: B023
        assert verdict(lambda: examine(one, extension, "list:1", "full")) == training  # noqa: B023
        verdicts.append(training)
        if training == "good":
            assert verdict(lambda: shrink(one, extension, 24, "list:1")) == "good"  # noqa: B023
    assert verdicts[0] == "good"
    assert "good" not in verdicts[1:3]


def test_a_frame_whose_colours_cannot_be_converted_is_refused_by_name(monkeypatch):
    def fail(frame):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(conversion, "frame_on_white", fail)
    extension, media = FILES["MOV, ProRes"]
    with pytest.raises(BadSampleError, match=r"list:1: .*Operation not supported"):
        examine(media, extension, "list:1", "full")


@pytest.mark.parametrize(("form", "codec"), [("mpegts", "mpeg2video"), ("avi", "mpeg4")])
def test_a_clip_that_grows_is_refused(form, codec, monkeypatch):
    small, large = (media_files.clip(form, codec, sides=sides) for sides in ((32, 32), (512, 512)))
    grows = small + large
    for call in (lambda: shrink(grows, "avi", 16, "list:1"), lambda: examine(grows, "avi", "list:1", "full")):
        with pytest.raises(BadSampleError, match=r"frame 1[12] has another size than the first"):
            call()
    monkeypatch.setattr(conversion, "LIMITS", DecodeLimits(max_pixels=32 * 32))
    for call in (lambda: shrink(grows, "avi", 16, "list:1"), lambda: examine(grows, "avi", "list:1", "full")):
        with pytest.raises(BadSampleError, match="avcodec_send_packet"):  # by the decoder, before it takes memory
            call()


def test_a_picture_may_be_larger_than_training_takes_where_it_is_scaled(monkeypatch):
    photograph = media_files.saved("JPEG")
    monkeypatch.setattr(conversion, "LIMITS", DecodeLimits(max_pixels=1000))
    assert verdict(lambda: examine(photograph, "jpg", "list:1", "full")) == "too_many_pixels"
    assert verdict(lambda: examine(photograph, "jpg", "list:1", "full", scaled=True)) == "good"
    assert shrink(photograph, "jpg", 8, "list:1")[1] == "jpg"
    monkeypatch.setattr(conversion, "LIMITS_OF_SCALING", DecodeLimits(max_pixels=1000))
    assert verdict(lambda: shrink(photograph, "jpg", 8, "list:1")) == "too_many_pixels"


def test_frames_that_an_edit_list_cuts_off_stay_away():
    """Times from 0.25 s before the start: an MP4 then says in an edit list that the first three are not shown."""
    whole, file = media_files.clip(**{"x264-params": "bframes=2:keyint=4"}), io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format="mp4") as target:
        read = source.streams.video[0]
        written = target.add_stream_from_template(read)
        for packet in source.demux(read):
            if packet.dts is not None:
                shift = round(0.25 / read.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, written
                target.mux(packet)
    scaled, _ = shrink(file.getvalue(), "mp4", 24, "list:1")
    original, converted = decoded(file.getvalue(), "mp4"), decoded(scaled, "mp4")
    assert len(original) == len(converted) == 9
    assert difference(original, converted) < 4


@pytest.mark.parametrize(("name", "kind"), [("GIF, moving", "picture"), ("MP4, without B-frames", "video")])
def test_what_takes_training_too_long_is_scaled_down_but_not_without_end(name, kind, monkeypatch):
    extension, media = CLIPS[name]
    width, height = media_files.SIDES
    monkeypatch.setitem(limits._MAX_DECODED, kind, 11 * width * height)  # of 12 frames
    assert verdict(lambda: decoded(media, extension)) == "too_many_frames"
    assert verdict(lambda: examine(media, extension, "list:1", "full", scaled=True)) == "good"
    scaled, new_extension = shrink(media, extension, 24, "list:1")
    assert len(decoded(scaled, new_extension)) == 12
    monkeypatch.setitem(limits._MAX_DECODED, kind, width * height)  # tenfold are 10 frames
    assert verdict(lambda: shrink(media, extension, 24, "list:1")) == "too_many_frames"
