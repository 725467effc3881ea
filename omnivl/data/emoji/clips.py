"""Animated WebP to short H.264 clips on white."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omnivl.data.emoji.render import fit, on_white

CRF = 27
_TICKS = 1000  # time base: milliseconds


@dataclass(frozen=True)
class Clip:
    """Decoded frames.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``.
        duration_ms: Length of the whole animation.
    """

    frames: NDArray[np.uint8]
    duration_ms: int


def frame_positions(total: int, wanted: int) -> list[int]:
    """The middles of ``wanted`` equal parts of ``total`` frames; with fewer frames than parts some repeat."""
    return [(2 * part + 1) * total // (2 * wanted) for part in range(wanted)]


def read_animation(data: bytes, size: int, num_frames: int | None) -> Clip | None:
    """Decodes an animated WebP; None if it is a single frame.

    Args:
        data: WebP file.
        size: Side of the frames in pixels.
        num_frames: Frames to keep; None keeps all.
    """
    with Image.open(io.BytesIO(data)) as animation:
        total = int(getattr(animation, "n_frames", 1))
        if total < 2:
            return None
        chosen = frame_positions(total, total if num_frames is None else num_frames)
        kept: dict[int, NDArray[np.uint8]] = {}
        duration = 0
        for number in range(total):
            animation.seek(number)
            animation.load()
            duration += int(animation.info["duration"])
            if number in chosen:
                kept[number] = on_white(fit(animation.convert("RGBA"), size))
    return Clip(np.stack([kept[number] for number in chosen]), duration)


def encode_clip(clip: Clip, preset: str = "slower") -> bytes:
    """MP4 with H.264 in 4:2:0; equal frames give equal bytes.

    Encoded with one thread, without time stamps and without the encoder's assembly code: with it, x264's macroblock
    tree gave different bytes for the same frames within one process (524 of 728 clips), and results depended on the
    processor.

    Args:
        clip: Frames; sides are even.
        preset: x264's speed.
    """
    buffer = io.BytesIO()
    count, height, width = clip.frames.shape[:3]
    container = av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"})
    with container:
        rate = Fraction(count * 1000, clip.duration_ms).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, _TICKS)
        stream.options = {"crf": str(CRF), "preset": preset, "threads": "1", "x264-params": "threads=1:no-asm=1"}
        for number, pixels in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number * clip.duration_ms // count
            frame.time_base = Fraction(1, _TICKS)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()
