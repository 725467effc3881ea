"""Writes a clip again as H.264 in MP4: scaled down, or only some of its seconds.

What is kept: every frame with its time, also where the rate varies; the rotation and mirroring that the file asks for;
the form of its pixels. What is not: sound, transparency (white is put behind it), more than 8 bits per colour, odd
sides (they grow by a pixel).

Shapes: H x W pixels; sizes are (width, height).
"""

import gc
import io
import math
from contextlib import closing
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np

from omnivl.data.container import display_matrix, open_container
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import BadSampleError
from omnivl.data.transparency import frame_on_white
from omnivl.data.video import clip_frames

_CRF = "18"  # visually lossless
_TICKS = 90_000  # per second: a multiple of all usual rates, and MPEG's own
_USUAL_RATE = Fraction(25)
_RATES = (1, 1000)  # frames per second that an encoder plans for; each frame has its own time all the same
_LONGEST_GAP = 3600 * _TICKS  # of two frames: an MP4 has 31 bits for it, and what exceeds it is a damaged time
_MOST_PACKETS = 10_000_000  # of a film that is cut: they are only listed
_BT601, _LIMITED_RANGE = 6, 1  # what libswscale makes of RGB (smpte170m, "tv")


def transcode(
    data: bytes,
    where: str,
    limits: DecodeLimits,
    *,
    size: tuple[int, int] | None = None,
    seconds: tuple[float, float] | None = None,
) -> bytes:
    """Writes a clip again.

    Args:
        data: The file.
        where: For messages.
        limits: Bounds of decoding, and of the number of frames written.
        size: The new width and height; None keeps them.
        seconds: From when to when, counted from the first frame; frames from the first time on and before the second
            are kept. None keeps all.

    Raises:
        BadSampleError: It does not decode, or no frame lies between the seconds.
    """
    start, end = seconds or (0.0, math.inf)
    listed = limits if seconds is None else replace(limits, max_frames=_MOST_PACKETS)
    rate, ratio, first_pts = _rate_and_ratio(data, where, listed)
    writer = _Writer(rate, ratio)
    for number, frame in enumerate(clip_frames(data, where, listed, since=start)):
        if frame.pts is None or frame.time_base is None or first_pts is None:
            time = number / rate
        else:
            time = (frame.pts - first_pts) * frame.time_base
        if float(time) < start:
            continue
        if float(time) >= end:
            break
        if writer.count == limits.max_frames:
            raise BadSampleError("too_many_frames", where, f"more than {limits.max_frames} frames; allowed: that many")
        writer.write(frame, time, size)
    if not writer.count:
        detail = f"no frame between the seconds {start:g} and {end:g}: the clip is shorter"
        raise BadSampleError("broken_video", where, detail)
    written = writer.finish()
    del frame
    gc.collect()  # see display_matrix
    return written


def _rate_and_ratio(data: bytes, where: str, limits: DecodeLimits) -> tuple[Fraction, Fraction | None, int | None]:
    """Frames per second on average, the form of a pixel, and the time of the first frame (None without times)."""
    with closing(clip_frames(data, where, limits)) as frames:
        first = next(frames, None)
    with open_container(data, limits.max_pixels) as container:
        stream = container.streams.video[0]
        return stream.average_rate or _USUAL_RATE, stream.sample_aspect_ratio, None if first is None else first.pts


class _Writer:
    """An MP4 that grows frame by frame; one thread, so that the same clip gives the same bytes."""

    def __init__(self, rate: Fraction, ratio: Fraction | None) -> None:
        self.count = 0
        self._file = io.BytesIO()
        self._target = av.open(self._file, "w", format="mp4")
        planned = rate if _RATES[0] <= rate <= _RATES[1] else _USUAL_RATE
        self._stream = self._target.add_stream("libx264", rate=planned)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": _CRF, "preset": "fast", "threads": "1"}
        self._stream.time_base = Fraction(1, _TICKS)
        codec = self._stream.codec_context
        codec.time_base = Fraction(1, _TICKS)
        codec.colorspace, codec.color_range = _BT601, _LIMITED_RANGE
        if ratio:
            codec.sample_aspect_ratio = ratio
        self._ticks = 0  # of the last frame in the file that is read
        self._last = 0  # and in the one that is written

    def write(self, frame: "av.VideoFrame", time: Fraction, size: tuple[int, int] | None) -> None:
        """Appends a frame that is shown at a time in seconds."""
        if not self.count:
            width, height = size or (frame.width, frame.height)
            self._stream.width, self._stream.height = width + width % 2, height + height % 2  # 4:2:0 has no odd sides
            self._stream.set_display_matrix(display_matrix(frame))
            self._ticks = round(time * _TICKS) - 1
            self._last = -1
        rgb = frame_on_white(frame)
        sides = (self._stream.width, self._stream.height)
        if sides != (frame.width, frame.height):
            how = cv2.INTER_AREA if size is not None else cv2.INTER_LINEAR
            rgb = cv2.resize(rgb, sides, interpolation=how)
        written = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
            format="yuv420p", threads=1
        )
        ticks = round(time * _TICKS)
        self._last += min(max(ticks - self._ticks, 1), _LONGEST_GAP)
        self._ticks = ticks
        written.pts, written.time_base = self._last, Fraction(1, _TICKS)
        if frame.duration and frame.time_base is not None:
            written.duration = min(round(frame.duration * frame.time_base * _TICKS), _LONGEST_GAP)
        self._target.mux(self._stream.encode(written))
        self.count += 1

    def finish(self) -> bytes:
        """The whole file."""
        self._target.mux(self._stream.encode(None))
        self._target.close()
        return self._file.getvalue()
