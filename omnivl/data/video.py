"""Decodes frames of a video by PyAV: packets are listed first, so that only the needed frames are decoded.

Listing packets costs almost nothing, and gives the exact number of frames and the positions of key frames. Each wanted
frame is then reached on the shorter way: from the decoder's position, or from the last key frame before it.
"""

import gc
from collections.abc import Generator
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from omnivl.data.container import bounded, frame_orientation, open_container, video_size, video_stream
from omnivl.data.frames import ChooseFrames, Whole, gather_frames, wanted_frames
from omnivl.data.limits import PATIENCE, DecodeLimits, check_wanted, check_work
from omnivl.data.orientation import upright
from omnivl.data.sources.base import BadSampleError, naming
from omnivl.data.transparency import decoded_frames, frame_on_white

_MIN_SKIP = 4  # frames that a jump has to save to be worth flushing the decoder


class _OvershotError(Exception):
    """A seek has reached a frame after the wanted one."""


@dataclass(frozen=True)
class _Packets:
    """Presentation times of all frames in rising order, and for each the index of its key frame."""

    times: list[int]
    key_before: list[int]

    def jumps(self, target: int, standing: int) -> bool:
        """Whether ``target`` is reached by a jump to its key frame, from the last frame that was decoded."""
        return bool(self.key_before) and self.key_before[target] - standing > _MIN_SKIP

    def num_decoded(self, wanted: list[int]) -> int:
        """How many frames are decoded for those wanted (rising)."""
        total, standing = 0, -1
        for target in wanted:
            total += target - (self.key_before[target] - 1 if self.jumps(target, standing) else standing)
            standing = target
        return total


def decode_video(
    media: bytes, where: str, limits: DecodeLimits, choose: ChooseFrames, whole: Whole | None = None
) -> NDArray[np.uint8]:
    """Decodes the chosen frames to uint8 ``[T, H, W, 3]``, RGB, upright and on white.

    Args:
        media: The file.
        where: ``SHARD:KEY`` for messages.
        limits: Bounds above which nothing is decoded.
        choose: The frames wanted.
        whole: Whether to decode all frames instead; None for never.

    Raises:
        BadSampleError: ``broken_video``, ``too_many_pixels`` or ``too_many_frames``.
    """
    with naming("broken_video", where):
        packets, size = _listed(media, where, limits)
        wanted = wanted_frames(len(packets.times), size, choose, whole)
        chosen = sorted(set(wanted))
        check_wanted(len(chosen), size, where)
        check_work(packets.num_decoded(chosen), size, where, moving="video")
        try:
            frames = _decode_frames(media, packets, chosen, where, limits.max_pixels)
        except _OvershotError:
            packets = _Packets(packets.times, [])
            check_work(packets.num_decoded(chosen), size, where, moving="video")
            frames = _decode_frames(media, packets, chosen, where, limits.max_pixels)
        gc.collect(1)  # see display_matrix
        return gather_frames(frames, wanted)


def clip_frames(
    media: bytes, where: str, limits: DecodeLimits, since: float = 0.0
) -> Generator["av.VideoFrame", None, None]:
    """All frames of a clip, one after the other, as they are stored: what ``decode_video`` chooses from.

    It may take longer than ``decode_video`` (``PATIENCE``), as no training waits for it.

    Args:
        media: The file.
        where: ``SHARD:KEY`` or ``FILE:LINE`` for messages.
        limits: Bounds above which nothing is decoded.
        since: Seconds after the first frame from which on frames are wanted: it begins at a key frame before.

    Raises:
        BadSampleError: ``broken_video``, ``too_many_pixels`` or ``too_many_frames``.
    """
    with naming("broken_video", where):
        packets, size = _listed(media, where, limits)
        if not since:
            check_work(len(packets.times), size, where, moving="video", patience=PATIENCE)
        with open_container(media, limits.max_pixels) as container:
            stream = container.streams.video[0]
            options = bounded(stream, limits.max_pixels)
            target = None
            if since and packets.key_before and stream.time_base is not None:
                target = packets.times[0] + int(since / stream.time_base)
                container.seek(target, stream=stream, backward=True)
            count, shape = 0, None
            for frame in decoded_frames(container, stream, options):
                if target is not None and not count and (frame.pts is None or frame.pts > target):
                    break  # the jump went too far
                shape = shape or (frame.width, frame.height)
                if (frame.width, frame.height) != shape:
                    raise BadSampleError("broken_video", where, f"frame {count} has another size than the first")
                count += 1
                check_work(count, size, where, moving="video", patience=PATIENCE)
                yield frame
            if target is None and count < len(packets.times):
                raise BadSampleError("broken_video", where, f"frame {count} of {len(packets.times)} is not there")
        if target is not None and not count:
            yield from clip_frames(media, where, limits)


def _listed(media: bytes, where: str, limits: DecodeLimits) -> tuple[_Packets, tuple[int, int]]:
    """The packets of a clip whose header passes, and the (width, height) of its frames.

    Raises:
        BadSampleError: As by ``decode_video``.
    """
    with open_container(media, limits.max_pixels) as container:
        stream = video_stream(container, where)
        stream.thread_type = "NONE"  # workers are the parallelism
        size = video_size(stream, limits, where)
        return _list_packets(container, stream, where, limits.max_frames), size


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
    with open_container(media, max_pixels) as container:
        stream = container.streams.video[0]
        options = bounded(stream, max_pixels)
        decoder = decoded_frames(container, stream, options)
        orientation = 0  # not known yet; a clip has one
        standing = -1  # place of the last decoded frame
        for target in wanted:
            if packets.jumps(target, standing):
                container.seek(packets.times[target], stream=stream, backward=True)
                decoder = decoded_frames(container, stream, options)
            while target not in frames:
                frame = next(decoder, None)
                if frame is None:
                    raise BadSampleError("broken_video", where, f"frame {target} of {len(packets.times)} is not there")
                standing = place_of.get(frame.pts, standing + 1) if packets.key_before else standing + 1
                if standing == target:
                    orientation = orientation or frame_orientation(frame)
                    shown = upright(frame_on_white(frame)[None], orientation)[0]
                    if frames and shown.shape != next(iter(frames.values())).shape:
                        raise BadSampleError(
                            "broken_video", where, f"frame {target} has another size than those before"
                        )
                    frames[target] = shown
                elif standing > target:
                    raise _OvershotError
    return frames
