"""Decodes pictures and clips, after checking their size.

Shapes: T frames, H x W pixels. Results are uint8, RGB; what is transparent shows white.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from omnivl.data.augment import evaluation_view
from omnivl.data.config import FrameSamplingConfig, LoaderConfig
from omnivl.data.formats import MEDIA_EXTENSIONS, is_clip, is_complete, may_move, picture_format, picture_size
from omnivl.data.frames import sample_frames
from omnivl.data.jpeg import decode_jpeg
from omnivl.data.orientation import picture_orientation, upright
from omnivl.data.png import still_png
from omnivl.data.sources.base import BadSampleError, Sample, naming
from omnivl.data.transparency import on_white
from omnivl.data.video import decode_video

Pixels = NDArray[np.uint8]
ChooseFrames = Callable[[int], list[int]]


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds that are checked before anything is decoded.

    Attributes:
        max_pixels: Pixels per picture or frame.
        max_frames: Frames per clip.
    """

    max_pixels: int = 40_000_000
    max_frames: int = 20_000


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
    _check_pixels(size, limits, sample.where)
    if not is_complete(media):
        raise BadSampleError("broken_image", sample.where, f"the {kind} file ends early, at {len(media)} bytes")
    with naming("broken_image", sample.where):
        if kind == "jpeg":
            return upright(decode_jpeg(media, needed)[None], picture_orientation(media))
        if may_move(media):
            return _pillow_frames(media, lambda total: [0], limits, sample.where)
        return upright(to_rgb(stored_pixels(media))[None], picture_orientation(media))


def stored_pixels(media: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """A PNG, BMP or still WebP as it is stored: grey ``[H, W]``, BGR or BGRA ``[H, W, C]``, of 8 or 16 bits.

    Raises:
        ValueError: It cannot be decoded.
    """
    kind = picture_format(media)
    if kind == "png":
        media = still_png(media)
    old_bitmap = kind == "bmp" and media[14:18] == b"\x0c\0\0\0"  # OS/2: OpenCV would take it for grey
    how = cv2.IMREAD_COLOR if old_bitmap else cv2.IMREAD_UNCHANGED
    pixels: NDArray[np.uint8] | NDArray[np.uint16] | None = cv2.imdecode(np.frombuffer(media, dtype=np.uint8), how)
    if pixels is None:
        raise ValueError(f"the {kind} data cannot be decoded")
    return _with_grey_key(pixels, media) if kind == "png" and pixels.ndim == 2 else pixels


def decode_clip(sample: Sample, limits: DecodeLimits, choose: ChooseFrames) -> Pixels:
    """Decodes the chosen frames of a clip to ``[T, H, W, 3]``.

    Args:
        sample: With ``media`` or ``frames``.
        limits: Bounds.
        choose: Number of frames of the clip -> frames wanted, in rising order; repeats are allowed.

    Raises:
        BadSampleError: ``broken_video``, ``broken_image``, ``too_many_pixels``, ``too_many_frames`` or
            ``unknown_extension``.
    """
    if sample.frames is not None:
        return sample.frames[choose(len(sample.frames))]
    media = _media(sample)
    if picture_format(media) is None:
        return decode_video(media, sample.where, limits.max_pixels, limits.max_frames, choose)
    size = picture_size(media)
    if size is None:
        raise BadSampleError("broken_image", sample.where, "the picture's header is broken")
    _check_pixels(size, limits, sample.where)
    with naming("broken_image", sample.where):
        return _pillow_frames(media, choose, limits, sample.where)


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
    if num_frames == 1 and sample.frames is None and not is_clip(sample.extension, sample.media or b""):
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


def _check_pixels(size: tuple[int, int], limits: DecodeLimits, where: str) -> None:
    if size[0] * size[1] > limits.max_pixels:
        detail = f"{size[0]} x {size[1]} pixels; allowed: {limits.max_pixels} in all"
        raise BadSampleError("too_many_pixels", where, detail)


def _with_grey_key(
    pixels: NDArray[np.uint8] | NDArray[np.uint16], media: bytes
) -> NDArray[np.uint8] | NDArray[np.uint16]:
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
        return on_white(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # type: ignore[no-any-return]


def _pillow_frames(media: bytes, choose: ChooseFrames, limits: DecodeLimits, where: str) -> Pixels:
    """Frames of a GIF or an animated WebP."""
    with Image.open(io.BytesIO(media), formats=("GIF", "WEBP", "PNG", "JPEG", "BMP")) as picture:
        total = int(getattr(picture, "n_frames", 1))
        if total > limits.max_frames:
            raise BadSampleError("too_many_frames", where, f"{total} frames; allowed: {limits.max_frames}")
        wanted = choose(total)
        frames: dict[int, Pixels] = {}
        for number in sorted(set(wanted)):
            picture.seek(number)
            rgba = picture.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            frames[number] = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.stack([frames[number] for number in wanted])
