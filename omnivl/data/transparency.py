"""Shows what is transparent on white, in pictures and in clips.

Shapes: H x W pixels, uint8.
"""

from collections.abc import Iterator

import av
import cv2
import numpy as np
from numpy.typing import NDArray

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that also read WebM's second picture, which holds the alpha; the usual ones leave it out."""


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H, W, 4]``, RGBA, to RGB ``[H, W, 3]``."""
    colour = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = cv2.cvtColor(rgba[:, :, 3], cv2.COLOR_GRAY2RGB)
    return cv2.add(cv2.multiply(colour, alpha, scale=1 / 255), cv2.bitwise_not(alpha))  # type: ignore[no-any-return]


def frame_on_white(frame: "av.VideoFrame") -> NDArray[np.uint8]:
    """A frame of a clip as RGB ``[H, W, 3]``, as it is stored (not turned).

    One thread converts: workers are the parallelism, and several threads of libswscale now and then spoil rows of some
    formats.
    """
    if any(component.is_alpha for component in frame.format.components):
        # not by way of "rgba": libswscale makes the last columns of some yuva420p widths transparent
        return on_white(np.ascontiguousarray(frame.to_ndarray(format="gbrap", threads=1)))
    return frame.to_ndarray(format="rgb24", threads=1)  # type: ignore[no-any-return]


def decoded_frames(
    container: "av.container.InputContainer", stream: "av.VideoStream", options: dict[str, str]
) -> Iterator["av.VideoFrame"]:
    """All frames from where the container stands, with their alpha.

    Args:
        container: The open file.
        stream: Its pictures.
        options: Of the decoder.
    """
    codec = stream.codec_context
    name = _ALPHA_DECODERS.get(codec.name) if stream.metadata.get("alpha_mode") == "1" else None
    if name is None:
        if not codec.is_open:
            codec.options = options
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(name, "r")
    decoder.extradata = codec.extradata
    decoder.options = options
    decoder.thread_count = 1
    for packet in container.demux(stream):
        yield from decoder.decode(packet)
