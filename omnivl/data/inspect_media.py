"""Size, frames and duration of a picture or clip from its headers, and small pictures of it for a contact sheet."""

import base64
import io
from dataclasses import dataclass

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omnivl.data.container import open_container, stream_orientation, video_size, video_stream
from omnivl.data.decode import decode_clip, decode_still
from omnivl.data.formats import CLIP_EXTENSIONS, frame_durations, is_clip, may_move, picture_format, picture_size
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.orientation import turned_size, upright_size
from omnivl.data.sources.base import BadSampleError, Sample, naming

_STILL_SIDE = 224
_STRIP_SIDE = 112
_STRIP_FRAMES = 6
_STRIP_GAP = 2


@dataclass(frozen=True)
class MediaFacts:
    """The content of a header. ``frames`` and ``seconds`` are None for stills, ``seconds`` also without a rate."""

    width: int
    height: int
    frames: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """E.g. ``64 x 48, 12 frames, 0.5 s``."""
        parts = [f"{self.width} x {self.height}"]
        if self.frames is not None:
            parts.append(f"{self.frames} frames")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s")
        return ", ".join(parts)


def has_media(sample: Sample) -> bool:
    """Whether a sample shows anything."""
    return sample.frames is not None or sample.media is not None


def moves(sample: Sample) -> bool:
    """Whether a sample moves: a video, an animated picture, or drawn frames."""
    if sample.frames is not None:
        return len(sample.frames) > 1
    return is_clip(sample.extension, sample.media or b"")


def media_facts(sample: Sample) -> MediaFacts:
    """Reads the header of a sample's media.

    Raises:
        BadSampleError: ``broken_image`` or ``broken_video``.
    """
    if sample.frames is not None:
        frames, height, width = sample.frames.shape[:3]
        return MediaFacts(width, height, frames)
    assert sample.media is not None, "a sample has media or frames"
    media, where = sample.media, sample.where
    if picture_format(media) is None and sample.extension in CLIP_EXTENSIONS:
        return _video_facts(media, where)
    size = picture_size(media)
    if size is None:
        raise BadSampleError("broken_image", where, "no picture header, or one that is cut or damaged")
    shown = upright_size(size, media)
    if not may_move(media):
        return MediaFacts(*shown)
    durations = frame_durations(media)
    if not durations:
        raise BadSampleError("broken_image", where, "no frame, or a file that is cut or damaged")
    return MediaFacts(*shown) if len(durations) == 1 else MediaFacts(*shown, len(durations), sum(durations) / 1000)


def _video_facts(media: bytes, where: str) -> MediaFacts:
    with naming("broken_video", where), open_container(media) as container:
        stream = video_stream(container, where)
        size = turned_size(video_size(stream, DEFAULT_LIMITS, where), stream_orientation(media))
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        seconds = None if container.duration is None else container.duration / av.time_base
    return MediaFacts(*size, frames, seconds)


def thumbnail(sample: Sample) -> str:
    """A data URI: the picture, or six frames of the clip side by side.

    Raises:
        BadSampleError: It does not decode.
    """
    if not moves(sample):
        return _data_uri(_fit(decode_still(sample, DEFAULT_LIMITS, needed=_STILL_SIDE)[0], _STILL_SIDE))
    frames = decode_clip(sample, DEFAULT_LIMITS, _strip_places)
    gap = np.full((_STRIP_SIDE, _STRIP_GAP, 3), 128, dtype=np.uint8)
    strip = [part for frame in frames for part in (gap, _fit(frame, _STRIP_SIDE))]
    return _data_uri(np.concatenate(strip[1:], axis=1))


def _strip_places(total: int) -> list[int]:
    count = min(total, _STRIP_FRAMES)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _fit(pixels: NDArray[np.uint8], height: int) -> NDArray[np.uint8]:
    """Scales to a height; smaller pictures are enlarged with hard edges, so that their pixels are visible."""
    width = max(1, round(pixels.shape[1] * height / pixels.shape[0]))
    mode = cv2.INTER_AREA if pixels.shape[0] > height else cv2.INTER_NEAREST
    scaled: NDArray[np.uint8] = cv2.resize(pixels, (min(width, 4 * height), height), interpolation=mode)
    return scaled


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
