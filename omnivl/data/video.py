"""Decodes frames of a video by PyAV: packets are listed first, so that only the needed frames are decoded.

Listing packets costs almost nothing, and gives the exact number of frames and the positions of key frames. Each wanted
frame is then reached on the shorter way: from the decoder's position, or from the last key frame before it.
"""

import gc
import io
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from numpy.typing import NDArray

from omnivl.data.limits import MAX_PIXELS, DecodeLimits, check_wanted, check_work
from omnivl.data.orientation import matrix_orientation, upright
from omnivl.data.sources.base import BadSampleError, naming

CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,flv"
"""Those of libav's containers that hold pictures themselves; an SDP, ffconcat or HLS text names what else to open."""

_MIN_SKIP = 4  # frames that a jump has to save to be worth flushing the decoder
_PADDING = 256  # by how much, at most, a decoder's sides exceed those of the header


Whole = Callable[[int, int], bool]
"""Whether a clip is to be decoded whole, by its number of frames and the pixels of each."""


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
    media: bytes, where: str, limits: DecodeLimits, choose: Callable[[int], list[int]], whole: Whole | None = None
) -> NDArray[np.uint8]:
    """Decodes the chosen frames to uint8 ``[T, H, W, 3]``, RGB.

    Args:
        media: The file.
        where: ``SHARD:KEY`` for messages.
        limits: Bounds above which nothing is decoded.
        choose: Number of frames -> frames wanted, in rising order; repeats are allowed.
        whole: Whether to decode all frames instead, by their number and the pixels of each.

    Raises:
        BadSampleError: ``broken_video``, ``too_many_pixels`` or ``too_many_frames``.
    """
    with naming("broken_video", where):
        with open_container(media, limits.max_pixels) as container:
            stream = video_stream(container, where)
            stream.thread_type = "NONE"  # workers are the parallelism
            size = video_size(stream, limits, where)
            packets = _list_packets(container, stream, where, limits.max_frames)
        total = len(packets.times)
        wanted = list(range(total)) if whole is not None and whole(total, size[0] * size[1]) else choose(total)
        chosen = sorted(set(wanted))
        check_wanted(len(chosen), size, where)
        check_work(packets.num_decoded(chosen), size, where, moving="video")
        try:
            frames = _decode_frames(media, packets, chosen, where, limits.max_pixels)
        except _OvershotError:
            packets = _Packets(packets.times, [])
            check_work(packets.num_decoded(chosen), size, where, moving="video")
            frames = _decode_frames(media, packets, chosen, where, limits.max_pixels)
        gc.collect(1)  # see frame_orientation
        return gather_frames(frames, wanted)


def gather_frames(frames: dict[int, NDArray[np.uint8]], wanted: list[int]) -> NDArray[np.uint8]:
    """The frames ``[T, H, W, 3]`` in rising order, as wanted; each is let go once it is copied."""
    gathered: NDArray[np.uint8] = np.empty((len(wanted), *frames[wanted[0]].shape), dtype=np.uint8)
    for place, number in enumerate(wanted):
        gathered[place] = frames[number]
        if number not in wanted[place + 1 : place + 2]:
            del frames[number]
    return gathered


def open_container(media: bytes, max_pixels: int = MAX_PIXELS) -> "av.container.InputContainer":
    """Opens a file that is wholly in memory; lists of other files and descriptions of network sessions are refused.

    Args:
        media: The file.
        max_pixels: Of a frame. Opening decodes some frames, to learn what they are, but none that are larger than this
            and than ``MAX_PIXELS``.
    """
    return av.open(
        io.BytesIO(media),
        metadata_errors="replace",
        container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": ""},
        options={"max_pixels": str(max(max_pixels, MAX_PIXELS))},
    )


def video_stream(container: "av.container.InputContainer", where: str) -> "av.VideoStream":
    """The first video stream that can be decoded.

    Raises:
        BadSampleError: ``broken_video``: there is none.
    """
    if not container.streams.video:
        raise BadSampleError("broken_video", where, "the file has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:  # libav knows no decoder
        raise BadSampleError("broken_video", where, "the file's video stream has an unknown codec")
    return stream


def video_size(stream: "av.VideoStream", limits: DecodeLimits, where: str) -> tuple[int, int]:
    """(width, height) of a stream's frames as they are stored.

    Raises:
        BadSampleError: ``broken_video`` or ``too_many_pixels``.
    """
    size = stream.codec_context.width, stream.codec_context.height
    if 0 in size:
        detail = f"the frames have no size, or more than {max(limits.max_pixels, MAX_PIXELS)} pixels"
        raise BadSampleError("broken_video", where, detail)
    limits.check_size(size, where)
    return size


def stream_orientation(media: bytes) -> int:
    """The orientation of a clip, 1 to 8, by its first frame: only frames have their display matrix."""
    with open_container(media) as container:
        stream = _bounded_stream(container, MAX_PIXELS)
        frame = next(container.decode(stream), None)
        orientation = 1 if frame is None else frame_orientation(frame)
        del frame
    gc.collect(1)  # see frame_orientation
    return orientation


def frame_orientation(frame: "av.VideoFrame") -> int:
    """The orientation in which a frame is to be shown, 1 to 8, by its display matrix.

    PyAV's frame and its side data then refer to each other. Callers collect this garbage as soon as it is some, since a
    worker process that is forked later would hang when it frees the decoder's memory.
    """
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    return 1 if matrix is None else matrix_orientation(bytes(matrix))


def _bounded_stream(container: "av.container.InputContainer", max_pixels: int) -> "av.VideoStream":
    """The first video stream, whose decoder refuses later frames that are larger than the header's and the limit."""
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # workers are the parallelism
    width, height = (side + _PADDING for side in (stream.codec_context.width, stream.codec_context.height))
    stream.codec_context.options = {"max_pixels": str(max(max_pixels, width * height))}
    return stream


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
        stream = _bounded_stream(container, max_pixels)
        decoder = container.decode(stream)
        orientation = 0  # not known yet; a clip has one
        standing = -1  # place of the last decoded frame
        for target in wanted:
            if packets.jumps(target, standing):
                container.seek(packets.times[target], stream=stream, backward=True)
                decoder = container.decode(stream)
            while target not in frames:
                frame = next(decoder, None)
                if frame is None:
                    raise BadSampleError("broken_video", where, f"frame {target} of {len(packets.times)} is not there")
                standing = place_of.get(frame.pts, standing + 1) if packets.key_before else standing + 1
                if standing == target:
                    orientation = orientation or frame_orientation(frame)
                    shown = upright(frame.to_ndarray(format="rgb24")[None], orientation)[0]
                    if frames and shown.shape != next(iter(frames.values())).shape:
                        raise BadSampleError(
                            "broken_video", where, f"frame {target} has another size than those before"
                        )
                    frames[target] = shown
                elif standing > target:
                    raise _OvershotError
    return frames
