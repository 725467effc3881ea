"""Pictures and clips that come from the page or go to it: read within bounds, or refused in a sentence.

Shapes: T frames, H x W pixels; uint8, RGB.
"""

import base64
import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from omnivl.data.augment import evaluation_view
from omnivl.data.config import FrameSamplingConfig
from omnivl.data.decode import Pixels, decode_clip, decode_still
from omnivl.data.formats import is_clip, picture_format
from omnivl.data.frames import sample_frames
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import BadSampleError, Cause, Sample
from omnivl.errors import UserError
from omnivl.inference.pictures import Media

LIMITS = DecodeLimits(max_frames=9_000)
"""Of uploads: a page waits for them. 9,000 frames are five minutes at 30 a second."""

MOST_FRAMES = 32
"""Frames of a clip that are decoded, evenly spread; the model chooses its own among them."""

_SMALLEST_SIDE, _NARROWEST = 8, 16
_ENOUGH_PIXELS = 512  # of the shorter side of a JPEG, which is decoded at a fraction of its size
_FRAME_MILLISECONDS = 120
_KNOWN = "PNG, JPEG, WebP, GIF, BMP, MP4, MOV, MKV, WebM, AVI or MPEG"
_VIDEO_HEADS = (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV")
_SENTENCES: dict[Cause, str] = {
    "broken_image": "got a picture that cannot be decoded ({}); allowed are whole files; save it again",
    "broken_video": "got a clip that cannot be decoded ({}); allowed are whole files; save it again",
    "too_many_pixels": "got {}; make it smaller",
    "too_many_frames": "got a clip that is too long, {}; cut it shorter",
}


@dataclass(frozen=True)
class Shown:
    """A picture, or frames of a clip.

    Attributes:
        media: ``image`` or ``video``.
        frames: ``[T, H, W, 3]``; T = 1 for a picture.
    """

    media: Media
    frames: Pixels

    @property
    def given(self) -> Pixels:
        """As a model takes it: ``[H, W, 3]`` of a picture, ``[T, H, W, 3]`` of a clip."""
        return self.frames[0] if self.media == "image" else self.frames


def decoded(sample: Sample, media: Media, limits: DecodeLimits = LIMITS) -> Shown:
    """Decodes a sample.

    Raises:
        BadSampleError: It cannot be read, or is beyond the bounds.
    """
    if media == "image":
        return Shown(media, decode_still(sample, limits, needed=_ENOUGH_PIXELS))
    spread = FrameSamplingConfig()
    frames = decode_clip(sample, limits, lambda total: sample_frames(total, min(total, MOST_FRAMES), spread, None))
    return Shown(media, frames)


def read_upload(data: bytes) -> Shown:
    """Reads a picture or clip that somebody sent, whatever its name says.

    Raises:
        UserError: It is no picture or clip, too small, too long, or damaged; one sentence.
    """
    if not data:
        raise UserError(f"picture: got an empty file; allowed are {_KNOWN}; choose another one")
    is_picture = picture_format(data) is not None
    if not is_picture and not _may_be_video(data):
        raise UserError(f"picture: got a file that is neither a picture nor a clip; allowed are {_KNOWN}")
    sample = Sample("upload", "the upload", media=data, extension="png" if is_picture else "mp4")
    moves = not is_picture or is_clip(sample.extension, data)
    try:
        shown = decoded(sample, "video" if moves else "image")
    except BadSampleError as error:
        told = _SENTENCES.get(error.rejection.cause, "got what cannot be read ({}); choose another file")
        raise UserError(f"{'clip' if moves else 'picture'}: {told.format(error.rejection.detail)}") from error
    height, width = shown.frames.shape[1:3]
    if min(height, width) < _SMALLEST_SIDE:
        raise UserError(
            f"picture: got {width} x {height} pixels; allowed are at least {_SMALLEST_SIDE} on each side; "
            "choose a larger one"
        )
    if max(height, width) > _NARROWEST * min(height, width):
        raise UserError(
            f"picture: got {width} x {height} pixels; allowed is a longer side of at most {_NARROWEST} times the "
            "shorter one; cut it"
        )
    return shown


def _may_be_video(data: bytes) -> bool:
    """Whether the first bytes are those of a container that is read; it may be damaged all the same."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return True
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return True
    if data[:1] == b"G" and data[188:189] == b"G":  # MPEG transport stream
        return True
    return data.startswith(_VIDEO_HEADS)


def view_of(frame: Pixels, side: int) -> str:
    """What the model sees of a frame, its middle square, as a data URI of ``side`` pixels."""
    return "data:image/png;base64," + base64.b64encode(thumbnail(frame, side)).decode()


def thumbnail(frame: Pixels, side: int) -> bytes:
    """The middle square of a frame ``[H, W, 3]`` as a PNG."""
    square = evaluation_view(frame[None], side).pixels[0]
    done, png = cv2.imencode(".png", np.ascontiguousarray(square[..., ::-1]))
    assert done, "OpenCV writes PNG"
    return png.tobytes()


def animation(frames: Pixels, side: int) -> bytes:
    """The middle squares of the frames as an animated WebP."""
    squares = [Image.fromarray(frame) for frame in evaluation_view(frames, side).pixels]
    file = io.BytesIO()
    squares[0].save(
        file, "WEBP", save_all=True, append_images=squares[1:], duration=_FRAME_MILLISECONDS, loop=0, quality=80
    )
    return file.getvalue()
