"""Uploads are read, or refused in one sentence that says what would do."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from colour_gallery import gif, picture, png
from PIL import Image

from launcher.serve.media import LIMITS, MOST_FRAMES, animation, read_upload, thumbnail
from omnivl.errors import UserError


def video(frames: int, size: int = 16, seconds_per_frame: int = 1) -> bytes:
    """An MP4 of grey frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(1, seconds_per_frame))
        stream.width = stream.height = size
        still = av.VideoFrame.from_ndarray(np.full((size, size, 3), 128, np.uint8), format="rgb24")
        for _ in range(frames):
            still.pts = None
            container.mux(stream.encode(still))
        container.mux(stream.encode())
    return file.getvalue()


def test_pictures_and_clips_are_told_apart_by_their_bytes() -> None:
    assert read_upload(png(picture("red"))).frames.shape == (1, 48, 48, 3)
    assert read_upload(png(picture("red"))).media == "image"
    clip = read_upload(gif(["red", "blue", "green"]))
    assert (clip.media, clip.frames.shape) == ("video", (3, 48, 48, 3))
    assert read_upload(gif(["red"])).media == "image"
    film = read_upload(video(50))
    assert (film.media, film.frames.shape) == ("video", (MOST_FRAMES, 16, 16, 3))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "picture: got an empty file; allowed are PNG, JPEG"),
        (b"Dear all,\nthis is a text.\n" * 40, "picture: got a file that is neither a picture nor a clip; allowed are"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture: got a file that is neither a picture nor a clip"),
        (b"%PDF-1.4", "picture: got a file that is neither a picture nor a clip"),
        (png(Image.new("RGB", (1, 1))), "picture: got 1 x 1 pixels; allowed are at least 8 on each side"),
        (png(Image.new("RGB", (9, 400))), "picture: got 9 x 400 pixels; allowed is a longer side of at most 16 times"),
        (png(picture("red"))[:-30], "picture: got a picture that cannot be decoded (the png file ends early"),
        (b"\0\0\0\x18ftypmp42" + bytes(300), "clip: got a clip that cannot be decoded"),
        (video(4)[:200], "clip: got a clip that cannot be decoded"),
    ],
    ids=["empty", "text", "svg", "pdf", "1x1", "narrow", "cut", "no film", "cut film"],
)
def test_what_is_no_usable_picture_is_said_in_a_sentence(data: bytes, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_upload(data)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_clip_of_four_hours_is_too_long() -> None:
    four_hours = video(4 * 3600)
    with pytest.raises(UserError, match=f"clip: got a clip that is too long, more than {LIMITS.max_frames} frames"):
        read_upload(four_hours)


def test_a_picture_that_claims_a_wall_is_refused_unread() -> None:
    huge = bytearray(png(picture("red")))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(UserError, match="picture: got 60000 x 60000 pixels; allowed: 40000000 in all; make it smaller"):
        read_upload(bytes(huge))


def test_small_pictures_of_the_page_show_the_middle_square() -> None:
    wide = np.asarray(picture("blue", (90, 30), share=1 / 3))
    small = np.asarray(Image.open(io.BytesIO(thumbnail(wide, 24))))
    assert small.shape == (24, 24, 3)
    assert (small[:, 2:] > 240).all(), "the blue third on the left is not part of it"
    moving = Image.open(io.BytesIO(animation(np.stack([wide, 255 - wide, wide]), 24)))
    assert (moving.format, moving.n_frames, moving.size) == ("WEBP", 3, (24, 24))
