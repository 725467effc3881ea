"""Shows what is transparent on white, in pictures and in clips.

Shapes: H x W pixels, uint8.
"""

from collections.abc import Iterable, Iterator

import av
import cv2
import numpy as np
from numpy.typing import NDArray

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that also read WebM's second picture, which holds the alpha; the usual ones leave it out."""


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H, W, 4]``, RGBA, to RGB ``[H, W, 3]``."""
    return _blended(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), rgba)


def bgra_on_white(bgra: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H, W, 4]``, BGRA, to RGB ``[H, W, 3]``."""
    return _blended(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGB), bgra)


def _blended(colour: NDArray[np.uint8], with_alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB ``[H, W, 3]`` on white, in place; the alpha is the last channel of ``[H, W, 4]``."""
    alpha = cv2.cvtColor(cv2.extractChannel(with_alpha, 3), cv2.COLOR_GRAY2RGB)
    cv2.multiply(colour, alpha, dst=colour, scale=1 / 255)
    return cv2.add(colour, cv2.bitwise_not(alpha, dst=alpha), dst=colour)  # type: ignore[no-any-return]


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
    packets: Iterable["av.Packet"], stream: "av.VideoStream", options: dict[str, str]
) -> Iterator["av.VideoFrame"]:
    """All frames of some packets, with their alpha.

    Args:
        packets: In the order of the file, the empty one at its end included.
        stream: To which they belong.
        options: Of the decoder.
    """
    codec = stream.codec_context
    name = _ALPHA_DECODERS.get(codec.name) if stream.metadata.get("alpha_mode") == "1" else None
    if name is None:
        if not codec.is_open:
            codec.options = options
        for packet in packets:
            yield from packet.decode()
        return
    decoder = av.CodecContext.create(name, "r")
    decoder.extradata = codec.extradata
    decoder.options = options
    decoder.thread_count = 1
    for packet in packets:
        yield from decoder.decode(packet)
