"""Decodes frames of a video by PyAV: packets are listed first, so that only the needed frames are decoded.

Listing packets costs almost nothing, and gives the exact number of frames and the positions of key frames. Each wanted
frame is then reached on the shorter way: from the decoder's position, or from the last key frame before it.
"""

import io
from collections.abc import Callable, Generator
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from omnivl.data.sources.base import BadSampleError, naming
from omnivl.data.transparency import decoded_frames, frame_on_white

CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,flv"
"""Those of libav's containers that hold pictures themselves; an SDP, ffconcat or HLS text names what else to open."""

_MIN_SKIP = 4  # frames that a jump has to save to be worth flushing the decoder
_PADDING = 256  # by how much, at most, a decoder's sides exceed those of the header


class _OvershotError(Exception):
    """A seek has reached a frame after the wanted one."""


@dataclass(frozen=True)
class _Packets:
    """Presentation times of all frames in rising order, and for each the index of its key frame."""

    times: list[int]
    key_before: list[int]


def decode_video(
    media: bytes, where: str, max_pixels: int, max_frames: int, choose: Callable[[int], list[int]]
) -> NDArray[np.uint8]:
    """Decodes the chosen frames to uint8 ``[T, H, W, 3]``, RGB.

    Args:
        media: The file.
        where: ``SHARD:KEY`` for messages.
        max_pixels: Pixels per frame above which nothing is decoded.
        max_frames: Frames above which nothing is decoded.
        choose: Number of frames -> frames wanted, in rising order; repeats are allowed.

    Raises:
        BadSampleError: ``broken_video``, ``too_many_pixels`` or ``too_many_frames``.
    """
    with naming("broken_video", where):
        packets = _listed(media, where, max_pixels, max_frames)
        wanted = choose(len(packets.times))
        try:
            frames = _decode_frames(media, packets, sorted(set(wanted)), where, max_pixels)
        except _OvershotError:
            frames = _decode_frames(media, _Packets(packets.times, []), sorted(set(wanted)), where, max_pixels)
        return np.stack([frames[number] for number in wanted])


def clip_frames(
    media: bytes, where: str, max_pixels: int, max_frames: int, since: float = 0.0
) -> Generator["av.VideoFrame", None, None]:
    """All frames of a clip, one after the other, as they are stored: what ``decode_video`` chooses from.

    Args:
        media: The file.
        where: ``SHARD:KEY`` or ``FILE:LINE`` for messages.
        max_pixels: Pixels per frame above which nothing is decoded.
        max_frames: Frames above which nothing is decoded.
        since: Seconds after the first frame from which on frames are wanted: it begins at a key frame before.

    Raises:
        BadSampleError: As by ``decode_video`` when it is asked for every frame.
    """
    with naming("broken_video", where):
        packets = _listed(media, where, max_pixels, max_frames)
        with open_container(media) as container:
            stream = container.streams.video[0]
            options = _prepared(stream, max_pixels)
            if since and packets.key_before and stream.time_base is not None:
                target = packets.times[0] + int(since / stream.time_base)
                container.seek(target, stream=stream, backward=True)
                frames = decoded_frames(container, stream, options)
                first = next(frames, None)
                if first is None or first.pts is None or first.pts > target:  # too far: from the front
                    yield from clip_frames(media, where, max_pixels, max_frames)
                    return
                yield first
                yield from frames
                return
            count, size = 0, None
            for frame in decoded_frames(container, stream, options):
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise BadSampleError("broken_video", where, f"frame {count} has another size than the first")
                count += 1
                yield frame
            if count < len(packets.times):
                raise BadSampleError("broken_video", where, f"frame {count} of {len(packets.times)} is not there")


def _listed(media: bytes, where: str, max_pixels: int, max_frames: int) -> _Packets:
    """The packets of a clip whose header passes.

    Raises:
        BadSampleError: As by ``decode_video``.
    """
    with open_container(media) as container:
        if not container.streams.video:
            raise BadSampleError("broken_video", where, "the file has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # workers are the parallelism
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            detail = f"{width} x {height} pixels; allowed: {max_pixels} in all"
            raise BadSampleError("too_many_pixels", where, detail)
        return _list_packets(container, stream, where, max_frames)


def _prepared(stream: "av.VideoStream", max_pixels: int) -> dict[str, str]:
    """Sets one thread; returns the decoder's options: later frames can grow, and each costs memory."""
    stream.thread_type = "NONE"
    width, height = (side + _PADDING for side in (stream.width, stream.height))
    return {"max_pixels": str(max(max_pixels, width * height))}


def open_container(media: bytes) -> "av.container.InputContainer":
    """Opens a file that is wholly in memory; lists of other files and descriptions of network sessions are refused."""
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
    return av.open(io.BytesIO(media), metadata_errors="replace", container_options=options)


def _list_packets(
    container: "av.container.InputContainer", stream: "av.VideoStream", where: str, max_frames: int
) -> _Packets:
    """Times and key frames of all packets; an empty ``key_before`` where the file gives no times."""
    found: list[tuple[int, bool]] = []
    timeless = False
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue  # the flush packet at the end; frames that an edit list cuts off
        timeless = timeless or packet.pts is None
        found.append((0 if packet.pts is None else packet.pts, packet.is_keyframe))
        if len(found) > max_frames:
            raise BadSampleError("too_many_frames", where, f"more than {max_frames} frames; allowed: {max_frames}")
    if not found:
        raise BadSampleError("broken_video", where, "the video stream has no frames")
    if timeless or len({time for time, _ in found}) != len(found):
        return _Packets(list(range(len(found))), [])
    found.sort()
    key_before: list[int] = []
    for place, (_, is_key) in enumerate(found):
        key_before.append(place if is_key or not key_before else key_before[-1])
    return _Packets([time for time, _ in found], key_before)


def _decode_frames(
    media: bytes, packets: _Packets, wanted: list[int], where: str, max_pixels: int
) -> dict[int, NDArray[np.uint8]]:
    """Decodes ``wanted`` (rising) on a fresh container; without ``key_before`` from front to back, counting.

    Raises:
        BadSampleError: ``broken_video``: a frame is not there.
        _OvershotError: A seek went too far: some formats find key frames only approximately.
    """
    place_of = {time: place for place, time in enumerate(packets.times)}
    frames: dict[int, NDArray[np.uint8]] = {}
    with open_container(media) as container:
        stream = container.streams.video[0]
        options = _prepared(stream, max_pixels)
        decoder = decoded_frames(container, stream, options)
        standing = -1  # place of the last decoded frame
        for target in wanted:
            if packets.key_before and packets.key_before[target] - standing > _MIN_SKIP:
                container.seek(packets.times[target], stream=stream, backward=True)
                decoder = decoded_frames(container, stream, options)
            while target not in frames:
                frame = next(decoder, None)
                if frame is None:
                    raise BadSampleError("broken_video", where, f"frame {target} of {len(packets.times)} is not there")
                standing = place_of.get(frame.pts, standing + 1) if packets.key_before else standing + 1
                if standing == target:
                    shown = np.rot90(frame_on_white(frame), frame.rotation // 90)  # by the display matrix
                    frames[target] = np.ascontiguousarray(shown)
                elif standing > target:
                    raise _OvershotError
    return frames
