"""Checks the bytes of a picture or clip before they are written into a shard, and scales them down on request."""

from typing import Literal

from omnivl.data.animated import count_frames, painted_frames
from omnivl.data.container import open_container, video_size, video_stream
from omnivl.data.convert.scale import scale_picture, smaller
from omnivl.data.convert.transcode import transcode
from omnivl.data.decode import check_picture, decode_still
from omnivl.data.formats import MEDIA_EXTENSIONS, is_clip, is_complete, picture_format, picture_size
from omnivl.data.limits import PATIENCE, DecodeLimits, check_work
from omnivl.data.sources.base import BadSampleError, Sample, naming
from omnivl.data.transparency import frame_on_white
from omnivl.data.video import clip_frames, decode_video

MediaKind = Literal["image", "video"]
Verify = Literal["header", "full"]

WRITTEN_EXTENSION = "mp4"
LIMITS = DecodeLimits()
"""Of clips, and of pictures that are copied: those of a plan that names none."""
LIMITS_OF_SCALING = DecodeLimits(max_pixels=178_956_970)
"""Of pictures that are scaled down before training sees them: Pillow's own bound, half a gibibyte of colours."""


def check_extension(extension: str, where: str) -> None:
    """Refuses files that no decoder reads.

    Raises:
        BadSampleError: ``unknown_extension``.
    """
    if extension not in MEDIA_EXTENSIONS:
        known = ", ".join(sorted(MEDIA_EXTENSIONS))
        shown = f".{extension} files are not read" if extension else "the name has no extension"
        raise BadSampleError("unknown_extension", where, f"{shown}; known: {known}")


def examine(data: bytes, extension: str, where: str, verify: Verify, scaled: bool = False) -> MediaKind:
    """Checks the bytes and returns what they are.

    Args:
        data: The file.
        extension: Its lower-case extension without dot.
        where: For messages.
        verify: ``header`` looks at headers and (for PNG and WebP) at the end; ``full`` decodes everything as training
            does, and refuses what training refuses.
        scaled: Whether it is scaled down afterwards, so that a picture may be larger than training takes.

    Raises:
        BadSampleError: ``broken_image``, ``broken_video``, ``too_many_pixels`` or ``too_many_frames``.
    """
    moves = is_clip(extension, data)
    limits = LIMITS_OF_SCALING if scaled and not moves else LIMITS
    if verify == "full":
        _decode(Sample("", where, data, extension), moves, limits, PATIENCE if scaled else 1)
    elif picture_format(data) is not None:
        if picture_size(data) is None or not is_complete(data):
            raise BadSampleError("broken_image", where, f"a cut or damaged {picture_format(data)} of {len(data)} bytes")
    elif not moves:
        raise BadSampleError("broken_image", where, f"{len(data)} bytes that are no picture, named .{extension}")
    else:
        with naming("broken_video", where):
            _stored_size(data, where)
    return "video" if moves else "image"


def _decode(sample: Sample, moves: bool, limits: DecodeLimits, patience: int) -> None:
    """Decodes all that training could ask for, one frame after the other."""
    assert sample.media is not None, "it was read"
    if not moves:
        decode_still(sample, limits)
    elif picture_format(sample.media) is None:
        with naming("broken_video", sample.where):  # colours that are damaged decode, and cannot be converted
            for shown in clip_frames(sample.media, sample.where, limits):
                frame_on_white(shown)
    else:
        size = check_picture(sample.media, limits, sample.where)
        with naming("broken_image", sample.where):
            total = count_frames(sample.media, limits, sample.where)
            check_work(total, size, sample.where, moving="picture", patience=patience)
            for frame in painted_frames(sample.media, total, limits, sample.where):
                frame.load()


def shrink(data: bytes, extension: str, shorter_side: int, where: str) -> tuple[bytes, str]:
    """Scales so that the shorter side has ``shorter_side`` pixels; smaller files are kept byte for byte.

    Pictures become JPEG (PNG where they have transparency or 16 bits, animated WebP where they move), clips H.264 in
    MP4 without sound. The loader makes the same of the result as of the original, but for the size.

    Returns:
        The bytes and their extension.

    Raises:
        BadSampleError: It does not decode.
    """
    if picture_format(data) is None:
        return _shrink_clip(data, extension, shorter_side, where)
    with naming("broken_image", where):
        moves = is_clip(extension, data)
        limits = LIMITS if moves else LIMITS_OF_SCALING
        stored = check_picture(data, limits, where)
        size = smaller(*stored, shorter_side)
        if size is None:
            return data, extension
        if moves:
            total = count_frames(data, limits, where)
            check_work(total, stored, where, moving="picture", patience=PATIENCE)
        return scale_picture(data, extension, size, limits, where)


def _shrink_clip(data: bytes, extension: str, shorter_side: int, where: str) -> tuple[bytes, str]:
    with naming("broken_video", where):
        size = smaller(*_stored_size(data, where), shorter_side)
        if size is None:
            return data, extension
        return transcode(data, where, LIMITS, size=size), WRITTEN_EXTENSION


def cut(data: bytes, seconds: tuple[float, float], shorter_side: int | None, where: str) -> bytes:
    """Some seconds of a longer clip, as H.264 in MP4 without sound, scaled as by ``shrink`` where asked.

    Args:
        data: The whole clip.
        seconds: From when to when, counted from its first frame.
        shorter_side: Pixels of the shorter side, if it is scaled.
        where: For messages.

    Raises:
        BadSampleError: It does not decode, or ends before the first of the seconds.
    """
    with naming("broken_video", where):
        size = None if shorter_side is None else smaller(*_stored_size(data, where), shorter_side)
        return transcode(data, where, LIMITS, size=size, seconds=seconds)


def shown_size(data: bytes, where: str) -> tuple[int, int] | None:
    """(width, height) of a video as it is shown; None where its first frame cannot be decoded."""
    try:
        frame = decode_video(data, where, LIMITS, lambda total: [0])[0]
    except BadSampleError:
        return None
    return frame.shape[1], frame.shape[0]


def _stored_size(data: bytes, where: str) -> tuple[int, int]:
    with open_container(data) as container:
        return video_size(video_stream(container, where), LIMITS, where)
