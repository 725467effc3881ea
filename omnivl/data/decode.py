"""Decodes pictures and clips, after checking their size.

Shapes: T frames, H x W pixels. Results are uint8, RGB; what is transparent shows white.
"""

import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from omnivl.data.augment import evaluation_view
from omnivl.data.config import FrameSamplingConfig, LoaderConfig
from omnivl.data.formats import (
    MEDIA_EXTENSIONS,
    STILL_EXTENSIONS,
    gif_extent,
    is_complete,
    moves,
    picture_format,
    picture_size,
)
from omnivl.data.frames import sample_frames
from omnivl.data.limits import DecodeLimits, check_wanted, check_work
from omnivl.data.orientation import picture_orientation, tagged_orientation, upright
from omnivl.data.sources.base import BadSampleError, Sample, naming
from omnivl.data.video import Whole, decode_video, gather_frames

Pixels = NDArray[np.uint8]
ChooseFrames = Callable[[int], list[int]]


def decode_still(sample: Sample, limits: DecodeLimits, needed: int = 0) -> Pixels:
    """Decodes a picture to ``[1, H, W, 3]``.

    Args:
        sample: With ``media`` or ``frames`` (of which the first is taken).
        limits: Bounds.
        needed: Shorter side, in pixels, that is sufficient: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size if
            both sides remain at least that long. 0 decodes in full.

    Raises:
        BadSampleError: ``broken_image``, ``too_many_pixels`` or ``unknown_extension``.
    """
    if sample.frames is not None:
        return sample.frames[:1]
    media = _media(sample)
    kind = picture_format(media)
    size = picture_size(media)
    if kind is None or size is None:
        raise BadSampleError("broken_image", sample.where, f"no known picture header in {len(media)} bytes")
    limits.check_size(size, sample.where)
    if not is_complete(media):
        raise BadSampleError("broken_image", sample.where, f"the {kind} file ends early, at {len(media)} bytes")
    with naming("broken_image", sample.where):
        if kind == "jpeg":
            return upright(_decode_jpeg(media, needed, limits, sample.where)[None], picture_orientation(media))
        if kind == "gif":
            return _pillow_frames(media, size, lambda total: [0], limits, sample.where)
        old_bitmap = kind == "bmp" and media[14:18] == b"\x0c\0\0\0"  # OS/2: OpenCV would take it for grey
        how = cv2.IMREAD_COLOR if old_bitmap else cv2.IMREAD_UNCHANGED
        pixels = cv2.imdecode(np.frombuffer(media, dtype=np.uint8), how)
        if pixels is None:
            raise BadSampleError("broken_image", sample.where, f"the {kind} data cannot be decoded")
        if kind == "png" and pixels.ndim == 2:
            pixels = _with_grey_key(pixels, media)
        return upright(to_rgb(pixels)[None], picture_orientation(media))


def decode_clip(sample: Sample, limits: DecodeLimits, choose: ChooseFrames, whole: Whole | None = None) -> Pixels:
    """Decodes the chosen frames of a clip to ``[T, H, W, 3]``; a picture that does not move is a clip of one frame.

    Args:
        sample: With ``media`` or ``frames``.
        limits: Bounds.
        choose: Number of frames of the clip -> frames wanted, in rising order; repeats are allowed.
        whole: Whether to decode all frames instead, by their number and the pixels of each; None for never.

    Raises:
        BadSampleError: ``broken_video``, ``broken_image``, ``too_many_pixels``, ``too_many_frames`` or
            ``unknown_extension``.
    """
    if sample.frames is not None:
        return sample.frames[choose(len(sample.frames))]
    media = _media(sample)
    if picture_format(media) is None:
        return decode_video(media, sample.where, limits, choose, whole)
    if not moves(media):
        picture = decode_still(sample, limits)[0]
        wanted = [0] if whole is not None and whole(1, picture.shape[0] * picture.shape[1]) else choose(1)
        check_wanted(len(wanted), (picture.shape[1], picture.shape[0]), sample.where)
        return np.stack([picture] * len(wanted))
    size = picture_size(media)
    if size is None:
        raise BadSampleError("broken_image", sample.where, "the picture's header is broken")
    limits.check_size(size, sample.where)
    if not is_complete(media):
        raise BadSampleError("broken_image", sample.where, f"the file ends early, at {len(media)} bytes")
    with naming("broken_image", sample.where):
        return _pillow_frames(media, size, choose, limits, sample.where, whole)


def decode_mask(sample: Sample, name: str, picture: bytes | None, limits: DecodeLimits) -> NDArray[np.bool_]:
    """Decodes a mask to bool ``[H, W]``, upright: pixels that are not black are inside.

    A mask that says no orientation itself is turned with its picture. It is not if it is tall and the picture is tall
    only when turned, or both are wide: then somebody has turned it already.

    Args:
        sample: With the mask among its ``members``.
        name: The mask's.
        picture: The file of the picture to which it belongs, if there is one.
        limits: Bounds.

    Raises:
        BadSampleError: ``broken_image`` or ``too_many_pixels``.
    """
    media = sample.members[name]
    size = picture_size(media)
    limits.check_size(size or (0, 0), f"{sample.where}.{name}")
    with naming("broken_image", sample.where):
        pixels = None
        if size is not None and is_complete(media):  # neither turned by OpenCV, nor rounded to 8 bits
            pixels = cv2.imdecode(np.frombuffer(media, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if size is None or pixels is None:
            raise BadSampleError("broken_image", sample.where, f"{name}: no picture that can be decoded")
        inside = pixels > 0 if pixels.ndim == 2 else (pixels[:, :, :3] > 0).any(axis=2)
        turn = picture_orientation(media)
        if turn == 1 and picture is not None:
            turn = picture_orientation(picture)
            wide, high = picture_size(picture) or size
            if turn >= 5 and (size[0] - size[1]) * (wide - high) < 0:
                turn = 1
        return upright(inside[None, :, :, None], turn)[0, :, :, 0]


def evaluation_frames(sample: Sample, size: int, num_frames: int, config: LoaderConfig) -> Tensor:
    """The plain view of a sample: uniform frames, resized and cropped in the middle; nothing random.

    Args:
        sample: A still or a clip.
        size: Side of the view in pixels.
        num_frames: Frames wanted; with 1, a clip gives its middle frame.
        config: Bounds of decoding.

    Returns:
        uint8 ``[num_frames, 3, size, size]``.

    Raises:
        BadSampleError: See ``decode_still`` and ``decode_clip``.
    """
    limits = DecodeLimits(config.max_pixels, config.max_frames)
    if num_frames == 1 and sample.extension in STILL_EXTENSIONS:
        pixels = decode_still(sample, limits, needed=size)
    else:
        pixels = decode_clip(
            sample, limits, lambda total: sample_frames(total, num_frames, FrameSamplingConfig(), None)
        )
    return torch.from_numpy(np.ascontiguousarray(evaluation_view(pixels, size).pixels.transpose(0, 3, 1, 2)))


def _media(sample: Sample) -> bytes:
    if sample.extension not in MEDIA_EXTENSIONS:
        known = ", ".join(sorted(MEDIA_EXTENSIONS))
        raise BadSampleError("unknown_extension", sample.where, f".{sample.extension} is not read; known: {known}")
    assert sample.media is not None, "a sample has media or frames"
    return sample.media


def _decode_jpeg(media: bytes, needed: int, limits: DecodeLimits, where: str) -> Pixels:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(media)
    except ValueError:
        colour = "unknown"
    else:
        limits.check_size((width, height), where)  # as the decoder itself finds it
    if colour in ("CMYK", "YCCK", "unknown"):
        with Image.open(io.BytesIO(media), formats=("JPEG",)) as picture:
            limits.check_size(picture.size, where)
            return np.asarray(picture.convert("RGB"))
    pixels: Pixels = simplejpeg.decode_jpeg(media, colorspace="RGB", min_height=needed, min_width=needed)
    return pixels


def _with_grey_key(pixels: NDArray[np.uint8], media: bytes) -> NDArray[np.uint8]:
    """Adds the alpha of a grey PNG with a transparent value (``tRNS``), which OpenCV leaves out."""
    found = media.find(b"\0\0\0\2tRNS", 33, max(33, media.find(b"IDAT")))
    if found < 0:
        return pixels
    depth = media[24]
    key = int.from_bytes(media[found + 8 : found + 10], "big") & ((1 << depth) - 1)
    key = key * 255 // ((1 << depth) - 1) if depth < 8 else key  # OpenCV widens 1, 2 and 4 bits to 8
    alpha = np.where(pixels == key, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    return np.stack([pixels, pixels, pixels, alpha], axis=2)


def to_rgb(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> Pixels:
    """OpenCV's grey, BGR or BGRA of 8 or 16 bits to RGB on white."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)  # type: ignore[no-any-return]
    if pixels.shape[2] == 4:
        colour = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB)
        alpha = cv2.cvtColor(pixels[:, :, 3], cv2.COLOR_GRAY2RGB)
        return cv2.add(cv2.multiply(colour, alpha, scale=1 / 255), cv2.bitwise_not(alpha))  # type: ignore[no-any-return]
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # type: ignore[no-any-return]


def _pillow_frames(
    media: bytes,
    size: tuple[int, int],
    choose: ChooseFrames,
    limits: DecodeLimits,
    where: str,
    whole: Whole | None = None,
) -> Pixels:
    """Frames of a GIF, an animated WebP or an animated PNG, which are painted one after the other."""
    if picture_format(media) == "gif":
        limits.check_frames(len(gif_extent(media).durations), where)
    with Image.open(io.BytesIO(media), formats=("GIF", "WEBP", "PNG")) as picture:
        total = int(getattr(picture, "n_frames", 1))
        limits.check_frames(total, where)
        wanted = list(range(total)) if whole is not None and whole(total, size[0] * size[1]) else choose(total)
        check_wanted(len(set(wanted)), size, where)
        check_work(wanted[-1] + 1, size, where, moving="picture")
        orientation = tagged_orientation(picture)
        frames: dict[int, Pixels] = {}
        for number in range(wanted[-1] + 1):
            picture.seek(number)
            limits.check_size(picture.size, where)  # a frame can enlarge the picture
            if number in wanted:
                rgba = picture.convert("RGBA")
                white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
                flat = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
                frames[number] = upright(flat[None], orientation)[0]
    return gather_frames(frames, wanted)
