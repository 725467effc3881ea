"""Checks the bytes of a picture or clip before they are written into a shard, and scales them down on request."""

import io
from typing import Literal

import av
import cv2
import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from omnivl.data.formats import (
    CLIP_EXTENSIONS,
    MEDIA_EXTENSIONS,
    is_animated,
    is_clip,
    is_complete,
    picture_format,
    picture_size,
)
from omnivl.data.sources.base import BadSampleError
from omnivl.data.video import open_container

MediaKind = Literal["image", "video"]
Verify = Literal["header", "full"]

_JPEG_QUALITY = 95
_H264_CRF = "18"  # visually lossless


def check_extension(extension: str, where: str) -> None:
    """Refuses files that no decoder reads.

    Raises:
        BadSampleError: ``unknown_extension``.
    """
    if extension not in MEDIA_EXTENSIONS:
        known = ", ".join(sorted(MEDIA_EXTENSIONS))
        shown = f".{extension} files are not read" if extension else "the name has no extension"
        raise BadSampleError("unknown_extension", where, f"{shown}; known: {known}")


def examine(data: bytes, extension: str, where: str, verify: Verify) -> MediaKind:
    """Checks the bytes and returns what they are.

    Args:
        data: The file.
        extension: Its lower-case extension without dot.
        where: For messages.
        verify: ``header`` looks at headers and (for PNG and WebP) at the end; ``full`` decodes everything.

    Raises:
        BadSampleError: ``broken_image`` or ``broken_video``.
    """
    try:
        if picture_format(data) is not None:
            if picture_size(data) is None or not is_complete(data):
                raise BadSampleError(
                    "broken_image", where, f"a cut or damaged {picture_format(data)} of {len(data)} bytes"
                )
            if verify == "full":
                _decode_picture(data)
            return "video" if is_clip(extension, data) else "image"
        if extension not in CLIP_EXTENSIONS:
            raise BadSampleError("broken_image", where, f"{len(data)} bytes that are no picture, named .{extension}")
        _open_video(data, decode=verify == "full")
    except av.FFmpegError as error:  # first, since some of these are also an OSError or a ValueError
        raise BadSampleError("broken_video", where, f"does not decode: {error}") from error
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadSampleError("broken_image", where, f"does not decode: {error}") from error
    except LookupError as error:
        raise BadSampleError("broken_video", where, str(error.args[0])) from error
    return "video"


def _decode_picture(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as picture:
        for frame in ImageSequence.Iterator(picture):
            frame.load()


def _open_video(data: bytes, decode: bool) -> None:
    with open_container(data) as container:
        if not container.streams.video:
            raise LookupError("the file has no video stream")
        if decode and not sum(1 for _ in container.decode(video=0)):
            raise LookupError("the video stream has no frame")


def shrink(data: bytes, extension: str, shorter_side: int, where: str) -> tuple[bytes, str]:
    """Scales so that the shorter side has ``shorter_side`` pixels; smaller files are kept byte for byte.

    Pictures become JPEG (PNG where they have transparency, animated WebP where they move), clips H.264 in MP4 without
    sound.

    Returns:
        The bytes and their extension.

    Raises:
        BadSampleError: It does not decode.
    """
    try:
        if picture_format(data) is not None:
            return _shrink_picture(data, extension, shorter_side)
        return _shrink_video(data, extension, shorter_side)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # FFmpegError is an OSError or a ValueError too, depending on its code
        cause: Literal["broken_image", "broken_video"] = "broken_image" if picture_format(data) else "broken_video"
        raise BadSampleError(cause, where, f"cannot be scaled: {error}") from error


def _smaller(width: int, height: int, shorter_side: int) -> tuple[int, int] | None:
    """The new size, or None if the picture is small enough."""
    shorter = min(width, height)
    if shorter <= shorter_side:
        return None
    return max(1, round(width * shorter_side / shorter)), max(1, round(height * shorter_side / shorter))


def _shrink_picture(data: bytes, extension: str, shorter_side: int) -> tuple[bytes, str]:
    with Image.open(io.BytesIO(data)) as picture:
        size = _smaller(*picture.size, shorter_side)
        if size is None:
            return data, extension
        out = io.BytesIO()
        if (picture_format(data) == "gif" or is_animated(data)) and getattr(picture, "n_frames", 1) > 1:
            durations: list[int] = []
            frames: list[Image.Image] = []
            for frame in ImageSequence.Iterator(picture):
                durations.append(int(frame.info.get("duration", 40)))
                frames.append(frame.convert("RGBA").resize(size, Image.Resampling.LANCZOS))
            frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=durations, quality=90, loop=0)
            return out.getvalue(), "webp"
        upright = ImageOps.exif_transpose(picture)
        if upright.size != picture.size:
            size = size[::-1]
        if upright.has_transparency_data:
            upright.convert("RGBA").resize(size, Image.Resampling.LANCZOS).save(out, "PNG")
            return out.getvalue(), "png"
        if upright.mode.startswith("I"):  # 16 bits of grey
            grey = np.asarray(upright).clip(0, 65535).astype(np.uint16)
            scaled = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
            return cv2.imencode(".png", scaled)[1].tobytes(), "png"
        upright.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=_JPEG_QUALITY)
        return out.getvalue(), "jpg"


def _shrink_video(data: bytes, extension: str, shorter_side: int) -> tuple[bytes, str]:
    with open_container(data) as container:
        source = container.streams.video[0]
        size = _smaller(source.codec_context.width, source.codec_context.height, shorter_side)
        if size is None:
            return data, extension
        out = io.BytesIO()
        with av.open(out, "w", format="mp4") as target:
            stream = target.add_stream("libx264", rate=source.average_rate or 25)
            stream.width, stream.height = (side + side % 2 for side in size)  # 4:2:0 has no odd sides
            stream.pix_fmt = "yuv420p"
            stream.options = {
                "crf": _H264_CRF,
                "preset": "fast",
                "threads": "1",
            }  # one thread: the same bytes each time
            for number, frame in enumerate(container.decode(source)):
                if number == 0:
                    stream.set_display_rotation(frame.rotation)
                scaled = frame.reformat(width=stream.width, height=stream.height, format="yuv420p")
                scaled.pict_type = av.video.frame.PictureType.NONE
                target.mux(stream.encode(scaled))
            target.mux(stream.encode(None))
    return out.getvalue(), "mp4"
