"""Decodes frames of a video by PyAV: packets are listed first, so that only the needed frames are decoded.

Listing packets costs almost nothing, and gives the exact number of frames and the positions of key frames. Each wanted
frame is then reached on the shorter way: from the decoder's position, or from the last key frame before it. Packets of
all but long clips are kept and decoded from where they are, since opening a file takes as long as decoding eight frames
of 96 pixels; those of long clips are read once more.
"""

import gc
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice

import av
import numpy as np
from numpy.typing import NDArray

from omnivl.data.container import (
    bounded,
    frame_orientation,
    open_container,
    stream_orientation,
    video_size,
    video_stream,
)
from omnivl.data.frames import ChooseFrames, Whole, gather_frames, wanted_frames
from omnivl.data.gpu_decode import frames_on_gpu
from omnivl.data.limits import PATIENCE, DecodeLimits, check_wanted, check_work
from omnivl.data.orientation import upright
from omnivl.data.sources.base import BadSampleError, naming
from omnivl.data.transparency import decoded_frames, frame_on_white

_MIN_SKIP = 4  # frames that a jump has to save to be worth flushing the decoder
_MOST_KEPT = 64 * 2**20  # bytes of packets that are held beside the file itself


class _OvershotError(Exception):
    """Decoding has reached a frame after the wanted one."""


@dataclass(frozen=True)
class _Packets:
    """The frames of a clip in the order of their presentation times.

    Attributes:
        times: Of all frames, rising.
        key_before: For each the index of its key frame; empty where the file gives no times.
        kept: The packets in the order of the file; empty where they are too large.
        places: For each frame the place of its packet among them, where ``key_before`` is known.
    """

    times: list[int]
    key_before: list[int]
    kept: list["av.Packet"]
    places: list[int]

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
    media: bytes,
    where: str,
    limits: DecodeLimits,
    choose: ChooseFrames,
    whole: Whole | None = None,
    device: str | None = None,
) -> NDArray[np.uint8]:
    """Decodes the chosen frames to uint8 ``[T, H, W, 3]``, RGB, upright and on white.

    Args:
        media: The file.
        where: ``SHARD:KEY`` for messages.
        limits: Bounds above which nothing is decoded.
        choose: The frames wanted.
        whole: Whether to decode all frames instead; None for never.
        device: The GPU that decodes; None for the CPU.

    Raises:
        BadSampleError: ``broken_video``, ``too_many_pixels`` or ``too_many_frames``.
    """
    with naming("broken_video", where):
        with open_container(media, limits.max_pixels) as container:
            packets, size = _listed(container, where, limits, _MOST_KEPT)
            wanted = wanted_frames(len(packets.times), size, choose, whole)
            chosen = sorted(set(wanted))
            check_wanted(len(chosen), size, where)
            check_work(packets.num_decoded(chosen), size, where, moving="video")
            if device is not None and _is_plain(container, media):
                return frames_on_gpu(media, wanted, device)
            try:
                if packets.kept:
                    frames = _decode_frames(container, packets, chosen, where, limits.max_pixels)
                else:
                    frames = _decode_anew(media, packets, chosen, where, limits.max_pixels)
            except _OvershotError:
                packets = _Packets(packets.times, [], [], [])
                check_work(packets.num_decoded(chosen), size, where, moving="video")
                frames = _decode_anew(media, packets, chosen, where, limits.max_pixels)
            del packets
        gc.collect(1)  # see display_matrix
        return gather_frames(frames, wanted)


def _is_plain(container: "av.container.InputContainer", media: bytes) -> bool:
    """Whether a clip is shown as it is stored: neither turned nor mirrored, and without transparency."""
    stream = container.streams.video[0]
    pixels = stream.codec_context.format
    opaque = pixels is not None and not any(component.is_alpha for component in pixels.components)
    return opaque and stream.metadata.get("alpha_mode") != "1" and stream_orientation(media) == 1


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
        with open_container(media, limits.max_pixels) as container:
            packets, size = _listed(container, where, limits)
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
            for frame in decoded_frames(container.demux(stream), stream, options):
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


def _listed(
    container: "av.container.InputContainer", where: str, limits: DecodeLimits, most_kept: int = 0
) -> tuple[_Packets, tuple[int, int]]:
    """The packets of a clip whose header passes, and the (width, height) of its frames.

    Args:
        container: The file, just opened.
        where: ``SHARD:KEY`` for messages.
        limits: Bounds.
        most_kept: Bytes of packets above which none is kept.

    Raises:
        BadSampleError: As by ``decode_video``.
    """
    stream = video_stream(container, where)
    stream.thread_type = "NONE"  # workers are the parallelism
    size = video_size(stream, limits, where)
    return _list_packets(container, stream, where, limits.max_frames, most_kept), size


def _list_packets(
    container: "av.container.InputContainer", stream: "av.VideoStream", where: str, max_frames: int, most_kept: int
) -> _Packets:
    """All packets with their times and key frames."""
    found: list[tuple[int, bool, int]] = []
    kept: list[av.Packet] = []
    timeless, room = False, most_kept
    for place, packet in enumerate(container.demux(stream)):
        room -= packet.size
        if room >= 0:
            kept.append(packet)
        else:
            kept.clear()
        if packet.size == 0 or packet.is_discard:
            continue  # the flush packet at the end; frames that an edit list cuts off
        timeless = timeless or packet.pts is None
        found.append((0 if packet.pts is None else packet.pts, packet.is_keyframe, place))
        if len(found) > max_frames:
            raise BadSampleError("too_many_frames", where, f"more than {max_frames} frames; allowed: {max_frames}")
    if not found:
        raise BadSampleError("broken_video", where, "the video stream has no frames")
    if timeless or len({time for time, _, _ in found}) != len(found):
        return _Packets(list(range(len(found))), [], kept, [])
    found.sort()
    key_before: list[int] = []
    for number, (_, is_key, _) in enumerate(found):
        key_before.append(number if is_key or not key_before else key_before[-1])
    return _Packets([time for time, _, _ in found], key_before, kept, [place for _, _, place in found])


def _decode_anew(
    media: bytes, packets: _Packets, wanted: list[int], where: str, max_pixels: int
) -> dict[int, NDArray[np.uint8]]:
    """Decodes ``wanted`` (rising) from a file that is opened once more; see ``_decode_frames``."""
    with open_container(media, max_pixels) as container:
        return _decode_frames(container, packets, wanted, where, max_pixels)


def _decode_frames(
    container: "av.container.InputContainer", packets: _Packets, wanted: list[int], where: str, max_pixels: int
) -> dict[int, NDArray[np.uint8]]:
    """Decodes ``wanted`` (rising); without ``key_before`` from front to back, counting.

    Args:
        container: The file; just opened, where no packets are kept.
        packets: Of its clip.
        wanted: Frames.
        where: ``SHARD:KEY`` for messages.
        max_pixels: Of a frame.

    Raises:
        BadSampleError: ``broken_video``: a frame is not there.
        _OvershotError: A frame is not where it should be: some formats find key frames only approximately.
    """
    place_of = {time: place for place, time in enumerate(packets.times)}
    frames: dict[int, NDArray[np.uint8]] = {}
    stream = container.streams.video[0]
    options = bounded(stream, max_pixels)
    decoder = decoded_frames(packets.kept or container.demux(stream), stream, options)
    orientation = 0  # not known yet; a clip has one
    standing = -1  # place of the last decoded frame
    for target in wanted:
        if packets.jumps(target, standing):
            if packets.kept:
                stream.codec_context.flush_buffers()
                rest: Iterable[av.Packet] = islice(packets.kept, packets.places[packets.key_before[target]], None)
            else:
                container.seek(packets.times[target], stream=stream, backward=True)
                rest = container.demux(stream)
            decoder = decoded_frames(rest, stream, options)
        while target not in frames:
            frame = next(decoder, None)
            if frame is None:
                raise BadSampleError("broken_video", where, f"frame {target} of {len(packets.times)} is not there")
            standing = place_of.get(frame.pts, standing + 1) if packets.key_before else standing + 1
            if standing == target:
                orientation = orientation or frame_orientation(frame)
                shown = upright(frame_on_white(frame)[None], orientation)[0]
                if frames and shown.shape != next(iter(frames.values())).shape:
                    raise BadSampleError("broken_video", where, f"frame {target} has another size than those before")
                frames[target] = shown
            elif standing > target:
                raise _OvershotError
    return frames
