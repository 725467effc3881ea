"""Opens clips by PyAV, and reads from their headers and first frames how they are to be shown."""

import gc
import io

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from omnivl.data.limits import MAX_PIXELS, DecodeLimits
from omnivl.data.orientation import matrix_orientation
from omnivl.data.sources.base import BadSampleError
from omnivl.data.transparency import decoded_frames

CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,flv"
"""Those of libav's containers that hold pictures themselves; an SDP, ffconcat or HLS text names what else to open."""

_PADDING = 256  # by how much, at most, a decoder's sides exceed those of the header


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
    """The first video stream, which can be decoded.

    Raises:
        BadSampleError: ``broken_video``: there is none, or it cannot.
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


def bounded(stream: "av.VideoStream", max_pixels: int) -> dict[str, str]:
    """Sets one thread; returns options by which the decoder refuses frames larger than the header's and the limit."""
    stream.thread_type = "NONE"  # workers are the parallelism
    width, height = (side + _PADDING for side in (stream.codec_context.width, stream.codec_context.height))
    return {"max_pixels": str(max(max_pixels, width * height))}


def stream_orientation(media: bytes) -> int:
    """The orientation of a clip, 1 to 8, by its first frame: only frames have their display matrix."""
    with open_container(media) as container:
        stream = container.streams.video[0]
        frame = next(decoded_frames(container.demux(stream), stream, bounded(stream, MAX_PIXELS)), None)
        orientation = 1 if frame is None else frame_orientation(frame)
        del frame
    gc.collect(1)  # see display_matrix
    return orientation


def frame_orientation(frame: "av.VideoFrame") -> int:
    """The orientation in which a frame is to be shown, 1 to 8, by its display matrix."""
    matrix = display_matrix(frame)
    return 1 if matrix is None else matrix_orientation(matrix)


def display_matrix(frame: "av.VideoFrame") -> list[int] | None:
    """The nine numbers of a frame's display matrix; None without one.

    PyAV's frame and its side data then refer to each other. Callers collect this garbage as soon as it is some, since a
    worker process that is forked later would hang when it frees the decoder's memory.
    """
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    return None if matrix is None else np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
